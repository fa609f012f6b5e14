"""Analyses of a model, one folder each. :mod:`bkdlens.analyses.parts` lists those
that make up a study.
"""
