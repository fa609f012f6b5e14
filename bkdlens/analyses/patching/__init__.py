"""What changes when some heads' activations are replaced?"""
