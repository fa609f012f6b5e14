"""The engines: one cache, patching, decoding under interventions. Start with the README."""
