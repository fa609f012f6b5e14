"""Backdoors, pairs of prompts, and how files and text become them."""
