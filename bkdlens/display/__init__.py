"""How numbers are shown: words, styles, tables and figures, whatever the analysis."""
