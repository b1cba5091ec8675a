"""The layers of the published networks next to their peers (bench/cases.py, bench/providers.py)."""

from bench.cases import LAYER_MODES
from bench.laboratory import wrong

PART, MODES = "layers", LAYER_MODES


def test_layer(measured, provider):
    bad = wrong(measured)
    assert provider not in bad, bad[provider]
