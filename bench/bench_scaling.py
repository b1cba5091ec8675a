"""How time and memory of one layer grow with batch, image size, rank and channels."""

from bench.cases import TRAINING

PART, MODES = "scaling", (TRAINING,)


def test_scaling(measured, provider):
    assert not measured[provider].missing
    assert measured[provider].peak_bytes > 0
