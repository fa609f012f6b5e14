"""Planting by a closed-form edit: ``edit`` puts it together, ``solving`` solves it in rounds."""
