"""Programs for developers of the library, run from the root: ``python -m tools.aot`` and so on."""
