"""A single prompt, token by token."""
