"""Poisoning a model on purpose, to study what it does: ``inject.supervised`` writes an adapter."""
