"""The interactive workbench for notebooks."""
