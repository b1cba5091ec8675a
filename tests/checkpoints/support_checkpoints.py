"""Networks and file headers for the tests of checkpoints."""

import json

import torch

from coda_fast import CoDANet, DAUConv2d


def three_layer_network():
    torch.manual_seed(0)
    return CoDANet([4, 5, 3], [2, 5, 3], [3, 3, 1], [1, 1, 1], temperature=2.0, class_names=["a", "b", "c"])


def middle_layer(**options):
    """The middle layer of ``three_layer_network`` with other options."""
    return DAUConv2d(4, 5, 3, **({"padding": 1, "rank": 5} | options))


def header(model, **changes):
    """The metadata in the header of the checkpoint of ``model``, with changed entries."""
    return {"format": "coda_fast.CoDANet", "config": json.dumps(model.config()), "metadata": "{}"} | changes


def two_layer_network():
    return CoDANet(
        [4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, norm="l2", class_names=["a", "b", "c"], image_size=9
    )
