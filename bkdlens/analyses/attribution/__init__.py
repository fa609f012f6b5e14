"""Which attention heads carry the backdoor?"""
