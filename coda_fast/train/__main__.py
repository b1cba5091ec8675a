"""``python -m coda_fast.train RECIPE [KEY=VALUE ...]``: the same as ``coda-fast train``, for torchrun."""

from coda_fast.cli import main

if __name__ == "__main__":
    import sys

    main(["train", *sys.argv[1:]])
