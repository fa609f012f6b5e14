"""Can the trigger be read off the hidden states?"""
