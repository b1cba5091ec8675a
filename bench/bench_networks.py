"""Whole CoDA-Nets next to the same networks made of the peers' layers, and next to ResNet-50s on the same
images.
"""

from bench.cases import NETWORK_MODES
from bench.laboratory import wrong

PART, MODES = "networks", NETWORK_MODES


def test_network(measured, provider):
    bad = wrong(measured, 4.0)
    assert provider not in bad, bad[provider]
    found = measured[provider]
    assert found.peak_bytes > 0
    assert all(0 < us for us in found.device_us)
