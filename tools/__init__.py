"""Programs for whoever works on the library, run from the root: ``python -m tools.aot`` and so on."""
