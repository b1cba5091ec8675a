"""Experiments whose results docs/ shows, run from the root: ``python -m experiments.training`` and so on."""
