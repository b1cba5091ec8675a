"""``python -m coda_fast``: the command line, as ``coda-fast``."""

from coda_fast.cli import main

main()
