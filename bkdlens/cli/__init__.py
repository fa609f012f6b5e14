"""The shell: one module per command, over shared options and inputs."""
