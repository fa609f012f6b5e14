"""Does one vector switch the backdoor on and off?"""
