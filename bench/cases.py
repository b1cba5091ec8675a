"""The cases that a preset measures: the layers of the published networks, the networks themselves, and a
layer of growing size.
"""

from __future__ import annotations

import dataclasses

from bench.peers import ALGEBRAIC, PEERS

FORWARD, TRAINING, EXPLANATION = "forward", "forward + backward", "explanation"
LAYER_MODES = (FORWARD, TRAINING, EXPLANATION)
INFERENCE, STEP = "inference", "training step"
EVERY_CLASS = "explanation of every class"
NETWORK_MODES = (STEP, INFERENCE, EXPLANATION, EVERY_CLASS)
AXES = ("batch", "size", "rank", "channels")
# The least number of matrix products of the size of the forward product that each mode needs. Forward needs
# 1. Backward needs 2 more (dx, dA) if the n r numbers per pixel of the forward product were kept, and 3 if
# not (save_contraction=False recomputes them). An explanation needs 1 more (dx).
PRODUCTS = {FORWARD: 1, TRAINING: 3, EXPLANATION: 2}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A DAU layer with a square kernel and padding (k - 1) / 2 on square images."""

    name: str
    channels: int
    units: int
    rank: int
    kernel: int
    stride: int
    size: int
    batch: int
    axis: str = ""  # the number that a scaling series varies
    modes: tuple[str, ...] = ()  # () stands for all modes of the bench

    @property
    def padding(self) -> int:
        return (self.kernel - 1) // 2

    @property
    def depth(self) -> int:
        """d: the number of inputs in a patch."""
        return self.channels * self.kernel**2

    @property
    def pixels(self) -> int:
        """P: the number of output pixels of the batch."""
        return self.batch * ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2

    @property
    def shape(self) -> dict:
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("name", "axis", "modes")}


@dataclasses.dataclass(frozen=True)
class Network:
    """A CoDA-Net by name on square images. The yardsticks get the same images and number of classes."""

    name: str
    batch: int
    size: int
    modes: tuple[str, ...] = NETWORK_MODES[:3]
    compiled: bool = True  # whether to measure torch.compile too
    every_peer: bool = True  # also those that are slow on a CPU: materialising in every mode, checkpointed

    @property
    def shape(self) -> dict:
        return {"batch": self.batch, "size": self.size}


NETWORKS = {"S": "coda_s_cifar10", "L": "coda_l_imagenet100"}


def layers(batch: dict[str, int]) -> dict[str, Layer]:
    """{"S1": ..., "L9": ...}: all layers of the published networks in order, at the batch sizes {"S": batch,
    "L": batch}.
    """
    from coda_fast import create_model

    found = {}
    for letter in batch:
        model = create_model(NETWORKS[letter], device="meta")
        size = model.image_size
        for i, layer in enumerate(model.layers):
            name = f"{letter}{i + 1}"
            found[name] = Layer(
                name,
                layer.in_channels,
                layer.out_channels,
                layer.rank,
                layer.kernel_size[0],
                layer.stride[0],
                size,
                batch[letter],
            )
            size, _ = layer.geometry.output_size(size, size)
    return found


def distinct(found: dict[str, Layer]) -> list[Layer]:
    """One layer for each shape, named after all layers of that shape: "S4, S5"."""
    names = {}
    for name, layer in found.items():
        names.setdefault(dataclasses.replace(layer, name=""), []).append(name)
    return [dataclasses.replace(layer, name=", ".join(same)) for layer, same in names.items()]


@dataclasses.dataclass(frozen=True)
class Preset:
    """What one run measures. ``compiled``: which providers are also measured through torch.compile, by mode
    (a compilation takes seconds).
    """

    layers: tuple[Layer, ...]
    networks: tuple[Network, ...]
    scaling: tuple[Layer, ...]
    compiled: dict[str, tuple[str, ...]]
    dtype: str
    compiled_layers: str = ""  # the layers that are compiled

    def compiled_in(self, case: Layer | Network, mode: str) -> tuple[str, ...]:
        wanted = case.name.startswith(self.compiled_layers) and getattr(case, "compiled", True)
        return self.compiled.get(mode, ()) if wanted else ()


def preset(name: str, memory_bytes: int = 0, batch: int | None = None, everything: bool = False) -> Preset:
    """The preset of a name.

    "smoke": everything once, small. "cpu": training of the layers of S-CoDA at the published batch size of
    16, and the network at batch sizes 16, 64 and 1, in some minutes on two cores. With ``everything`` also
    all modes and providers of the layers and the growth of a layer; or all modes of both at another
    ``batch``. "gpu": S-CoDA at batch 256, and L-CoDA at 64, or at 16 on a device with less than 60 GB.
    """
    if name == "smoke":
        return _smoke()
    if name == "cpu":
        return _cpu(batch, everything)
    if name == "gpu":
        return _gpu(64 if memory_bytes >= 60e9 else 16)
    raise ValueError(f"preset: expected smoke, cpu or gpu, got {name!r}")


def _smoke():
    small = [case for case in distinct(layers({"S": 1})) if case.name in ("S1", "S9")]
    base = Layer("scaling", 8, 8, 8, 3, 1, 8, 1)
    return Preset(
        tuple(dataclasses.replace(case, size=8) for case in small),
        (Network(NETWORKS["S"], 2, 8, NETWORK_MODES),),
        _series(base, batch=(1, 2), size=(8, 16), rank=(8, 16), channels=(8, 16)),
        {TRAINING: tuple(name for name, peer in PEERS.items() if not peer.recomputes)},
        "float32",
        "S9",
    )


def _cpu(batch, everything):
    compiled = dict.fromkeys((TRAINING, STEP, INFERENCE), (ALGEBRAIC,))
    cases = tuple(distinct(layers({"S": batch or 16})))
    if batch:
        return Preset(cases, (Network(NETWORKS["S"], batch, 32),), (), compiled, "float32")
    few = dict(compiled=False)
    networks = (
        Network(NETWORKS["S"], 16, 32, every_peer=everything),
        Network(NETWORKS["S"], 64, 32, (STEP, INFERENCE), **few),
        Network(NETWORKS["S"], 1, 32, (INFERENCE, EXPLANATION, EVERY_CLASS), **few),
    )
    if not everything:
        cases = tuple(dataclasses.replace(case, modes=(TRAINING,)) for case in cases)
        return Preset(cases, networks, (), compiled, "float32")
    compiled = dict.fromkeys((TRAINING, INFERENCE, EXPLANATION), (ALGEBRAIC,))
    compiled[STEP] = (ALGEBRAIC, "coda_fast")
    base = Layer("scaling", 16, 16, 16, 3, 1, 16, 2)
    sizes = dict(
        batch=(1, 2, 4, 8, 16), size=(8, 16, 32, 64), rank=(4, 16, 64, 256), channels=(4, 16, 32, 64)
    )
    return Preset(cases, networks, _series(base, **sizes), compiled, "float32")


def _gpu(large):
    base = Layer("scaling", 64, 64, 64, 3, 1, 32, 32)
    sizes = dict(
        batch=(1, 4, 16, 64, 256),
        size=(8, 16, 32, 64, 128),
        rank=(8, 32, 128, 256),
        channels=(16, 32, 64, 128, 256),
    )
    return Preset(
        tuple(distinct(layers({"S": 256, "L": large}))),
        (Network(NETWORKS["S"], 256, 32), Network(NETWORKS["L"], large, 240)),
        _series(base, **sizes),
        dict.fromkeys((*LAYER_MODES, *NETWORK_MODES), (*PEERS, "coda_fast")),
        "bfloat16",
    )


def _series(base, **axes):
    """``base`` with one number varied at a time; input and output channels are varied together."""
    found = []
    for axis, values in axes.items():
        for value in values:
            changes = dict(channels=value, units=value) if axis == "channels" else {axis: value}
            found.append(dataclasses.replace(base, axis=axis, **changes))
    return tuple(found)
