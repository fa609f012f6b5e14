"""Does the attack need the heads that attribution names?"""
