"""The layers of the published networks, each beside its peers (bench/cases.py, bench/providers.py)."""

from bench.cases import LAYER_MODES
from bench.laboratory import wrong

PART, MODES = "layers", LAYER_MODES


def test_layer(measured):
    assert not wrong(measured), wrong(measured)
