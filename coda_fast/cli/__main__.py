"""``python -m coda_fast.cli``."""

from coda_fast.cli import main

main()
