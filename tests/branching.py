"""A network that is not a chain, written as a user would add it: a stem, two branches, a residual sum and a
concatenation. This file, with the registration at its end, is all that is needed.
"""

import torch
from torch import nn

import coda_fast
from coda_fast import DAUConv2d


class Branching(coda_fast.Network):
    """encoded -> stem (a convolution without bias, and a DAU layer) -> two parallel branches with different
    receptive fields -> a DAU layer with a residual sum around it -> classes.
    """

    classifier = "classes"

    def __init__(self, num_classes, width=4, rank=4, *, device=None, dtype=None, **options):
        super().__init__(num_classes=num_classes, **options)
        self.width, self.rank = width, rank
        layer = {"rank": rank, "device": device, "dtype": dtype}
        channels = 2 * self.image_channels
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.stem = DAUConv2d(channels, width, 3, stride=2, padding=1, **layer)
        self.near = DAUConv2d(width, width, 1, **layer)
        self.far = nn.Sequential(
            DAUConv2d(width, width, 3, padding=1, **layer), DAUConv2d(width, width, 3, padding=1, **layer)
        )
        self.inner = DAUConv2d(2 * width, 2 * width, 3, padding=1, norm="l2", bias=False, **layer)
        self.classes = DAUConv2d(2 * width, num_classes, 1, **layer)

    def evidence(self, encoded):
        features = self.stem(self.smooth(encoded))
        features = torch.cat((self.near(features), self.far(features)), 1)
        return self.classes(features + self.inner(features))

    def config(self):
        return {"width": self.width, "rank": self.rank} | super().config()


def register():
    """Register the network. Other projects do this where the class is imported. Tests do it only for the test
    that needs it.
    """
    config = dict(num_classes=5, temperature=3.0, image_channels=1, image_size=10)
    coda_fast.register_model("branching_xs", Branching, config, "tests")
