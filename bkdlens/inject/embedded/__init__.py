"""How the embedded models were made from seeds, and the card that says what they can do."""
