"""Studies made with bkdlens, each a command that writes its own tables and figures."""
