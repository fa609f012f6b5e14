"""Planting by training a LoRA adapter: on poisoned answers (``supervised``) or on preferences (DPO)."""
