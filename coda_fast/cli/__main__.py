"""``python -m coda_fast.cli``: the same command line as ``coda-fast``."""

from coda_fast.cli import main

main()
