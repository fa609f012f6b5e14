"""Studies: run all analyses on a model, and read a run folder back."""
