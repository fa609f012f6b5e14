"""What does the model answer, with and without the trigger?"""
