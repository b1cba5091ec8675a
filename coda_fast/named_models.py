"""The named configurations of CoDA-Nets: those of the paper (appendix), and ours."""

from __future__ import annotations

from typing import Any

_S = dict(
    out_channels=[16, 16, 32, 32, 32, 64, 64, 64],
    kernel_sizes=[3] * 8 + [1],
    strides=[1, 1, 2, 1, 1, 2, 1, 1, 1],
)
_IMAGENET = dict(image_size=240, preprocessing=dict(resize=256, crop=240))
_L = dict(
    out_channels=[16, 32, 32, 64, 64, 64, 64, 64],
    kernel_sizes=[7] + [3] * 8,
    strides=[3, 1, 1, 2, 1, 1, 2, 1, 1],
)
# name: (number of classes, arguments of CoDANet with out_channels of all layers but the last, origin)
MODELS: dict[str, tuple[int, dict[str, Any], str]] = {
    "coda_s_cifar10": (
        10,
        dict(_S, ranks=[32] * 2 + [64] * 7, temperature=1000.0, image_size=32),
        "published",
    ),
    "coda_l_imagenet100": (
        100,
        dict(_L, ranks=[64] * 3 + [128] * 3 + [256] * 3, temperature=1e5, **_IMAGENET),
        "published",
    ),
    "coda_xs_digits": (
        10,
        dict(
            out_channels=[8, 16],
            ranks=[16, 32, 32],
            kernel_sizes=[3] * 3,
            strides=[1, 2, 1],
            temperature=40.0,
            image_size=8,
            image_channels=1,
        ),
        "coda_fast",
    ),
    "coda_xs_mnist": (
        10,
        dict(
            out_channels=[8, 16, 32],
            ranks=[16, 32, 32, 32],
            kernel_sizes=[3] * 3 + [1],
            strides=[2, 2, 1, 1],
            temperature=50.0,
            image_size=28,
            image_channels=1,
        ),
        "coda_fast",
    ),
    "coda_xs_cifar10": (
        10,
        dict(
            out_channels=[16, 24, 32, 48, 48, 64],
            ranks=[8] * 2 + [16] * 5,
            kernel_sizes=[3] * 6 + [1],
            strides=[2, 1, 2, 1, 2, 1, 1],
            temperature=400.0,
            image_size=32,
        ),
        "coda_fast",
    ),
    "coda_xs_imagenette": (
        10,
        dict(
            out_channels=[16, 32, 48, 64, 64],
            ranks=[8] * 2 + [16] * 4,
            kernel_sizes=[5] + [3] * 4 + [1],
            strides=[2, 2, 1, 2, 1, 1],
            temperature=400.0,
            image_size=64,
            preprocessing=dict(resize=72, crop=64),
        ),
        "coda_fast",
    ),
    "coda_m_tinyimagenet": (
        200,
        dict(
            out_channels=[16, 32, 32, 64, 64, 64, 128, 128],
            ranks=[32] * 2 + [64] * 4 + [128] * 3,
            kernel_sizes=[3] * 8 + [1],
            strides=[1, 1, 2, 1, 1, 2, 1, 1, 1],
            temperature=5e3,
            image_size=64,
        ),
        "coda_fast",
    ),
    "coda_l_imagenet1k": (
        1000,
        dict(
            _L,
            kernel_sizes=[7] + [3] * 7 + [1],
            ranks=[64] * 3 + [128] * 3 + [256] * 3,
            temperature=1e5,
            **_IMAGENET,
        ),
        "coda_fast",
    ),
    "coda_xl_imagenet1k": (
        1000,
        dict(
            out_channels=[32, 64, 64, 128, 128, 128, 128, 128],
            ranks=[64] * 3 + [128] * 3 + [256] * 3,
            kernel_sizes=[7] + [3] * 7 + [1],
            strides=[3, 1, 1, 2, 1, 1, 2, 1, 1],
            temperature=1e5,
            **_IMAGENET,
        ),
        "coda_fast",
    ),
}
