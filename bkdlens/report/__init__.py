"""A study as one offline html page, as sentences, and in the terminal."""
