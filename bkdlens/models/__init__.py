"""From untrusted files to a HookedTransformer."""
