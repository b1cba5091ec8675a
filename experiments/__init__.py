"""Experiments whose results are shown in docs/, run from the root: ``python -m experiments.training`` and so
on.
"""
