"""How time and memory of one layer grow with batch, image size, rank and channels."""

from bench.cases import TRAINING

PART, MODES = "scaling", (TRAINING,)


def test_scaling(measured, provider):
    found = measured[provider]
    assert found.peak_bytes > 0
    assert all(0 < us for us in found.device_us)
