"""What ``coda-fast demo`` shows: photographs explained by a network of the package (``photographs``), or the
training of small networks on scans of digits (``digits``).
"""

from coda_fast.demo.digits import (
    GRID,
    MODEL,
    TEMPERATURES,
    Data,
    Result,
    digits,
    evaluate,
    figure,
    localisation_score,
    run,
    score_text,
    train,
)

__all__ = [
    "GRID",
    "MODEL",
    "TEMPERATURES",
    "Data",
    "Result",
    "digits",
    "evaluate",
    "figure",
    "localisation_score",
    "run",
    "score_text",
    "train",
]
