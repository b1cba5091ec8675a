"""Launch configuration: a pure function of shape, dtype and device. Nothing here runs a kernel, needs a GPU,
or depends on the batch.

`candidates` lists tiles from the wanted one down to one that fits anywhere; a table of measured rows for the
device, where the package has one, puts its tile in front.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib

TABLES = pathlib.Path(__file__).parent / "tables"

# Shared memory that a program may have, bytes. NVIDIA: the programming guide's "maximum amount of shared
# memory per thread block".
SHARED_BYTES = {
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
    "gfx942": 65_536,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What configuration depends on: NVIDIA's compute capability as 80, 90, ... or AMD's "gfx942";
    processors for splitting sums.
    """

    arch: int | str
    processors: int = 4

    @property
    def shared_bytes(self) -> int:
        return SHARED_BYTES.get(self.arch, 65_536)

    @property
    def amd(self) -> bool:
        return isinstance(self.arch, str)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer as the kernels see it; everything that is fixed when they are compiled."""

    channels: int
    units: int
    rank: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    bits: int = 16

    @functools.cached_property
    def CP(self) -> int:
        """Channels, rounded up to 8 so that a row of a canvas is whole 16-byte words."""
        return -(-self.channels // 8) * 8

    @functools.cached_property
    def R(self) -> int:
        """Rank, rounded up to a power of two that a tensor core takes; above 256 to a multiple of 256."""
        return max(16, power_of_two(self.rank)) if self.rank <= 256 else -(-self.rank // 256) * 256

    @functools.cached_property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @functools.cached_property
    def block_k(self) -> int:
        """Step of the loop over a patch: the longest that pads a patch by at most an eighth, at least 16
        for the tensor cores.
        """
        depth = self.taps * self.CP
        return next(b for b in (64, 32, 16) if b == 16 or -(-depth // b) * b * 8 <= depth * 9)

    @functools.cached_property
    def K(self) -> int:
        """Numbers in a packed patch (kh, kw, channels), rounded up to whole steps."""
        return -(-self.taps * self.CP // self.block_k) * self.block_k

    @functools.cached_property
    def padded_units(self) -> int:
        """Units in whole blocks of the largest kind, so that the kernels read without masks."""
        return -(-self.units // 16) * 16

    @functools.cached_property
    def prepared(self) -> int:
        """Numbers in the packed parameters [n' R + R + n', K] and in the float32 scales [n] behind them."""
        rows = self.padded_units * self.R + self.R + (self.padded_units if self.bias else 0)
        return rows * self.K + self.units * 32 // self.bits

    @functools.cached_property
    def generated(self) -> bool:
        """Whether the forward pass generates w in registers; else it contracts the product with z (design:
        the two exact forms).
        """
        return self.R >= 128 or self.channels * self.taps <= 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes by the kernel's names for them, and how it is launched."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @classmethod
    def make(cls, warps: int, stages: int, **blocks: int) -> Tile:
        return cls(tuple(blocks.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @functools.cached_property
    def options(self) -> dict:
        """Keyword arguments of a launch."""
        # fusing multiplies with adds is asked for explicitly: its default goes from on to off in Triton 3.10
        return {
            **dict(self.blocks),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


def candidates(kernel: str, shape: Shape, device: Device) -> tuple[Tile, ...]:
    """Tiles for ``kernel``, the wanted one first, each of the others needing less of the device; at least
    one.

    >>> candidates("contracted", Shape(64, 64, 64, (3, 3)), Device(90))[0]
    Tile(blocks=(('BM', 128), ('BO', 4), ('BK', 64), ('BR', 32)), warps=8, stages=3)
    """
    fitting, table = _fitting(kernel, shape, device), _table(device.arch)
    measured = table.get(row_key(kernel, shape)) if table else None
    if measured is None:
        return fitting
    if not right(kernel, shape, measured):
        raise ValueError(
            f"table row {row_key(kernel, shape)!r}: expected blocks within {_limits(kernel, shape)}, got "
            f"{measured}"
        )
    return tuple(dict.fromkeys((measured, *fitting)))


@functools.lru_cache(4096)  # of every launch: it must cost the host next to nothing
def _fitting(kernel, shape, device):
    wanted = _heuristic(kernel, shape, device)
    return tuple(
        dict.fromkeys(t for t in wanted if shared_bytes(kernel, shape, t) <= device.shared_bytes)
    ) or (wanted[-1],)


def right(kernel: str, shape: Shape, tile: Tile) -> bool:
    """Whether the kernel computes the right thing with these blocks: it reads whole blocks, without masks."""
    limits, blocks = _limits(kernel, shape), dict(tile.blocks)
    return limits.keys() == blocks.keys() and all(
        least <= blocks[name] <= most and multiple % blocks[name] == 0
        for name, (least, most, multiple) in limits.items()
    )


def row_key(kernel: str, shape: Shape) -> str:
    """The key of a table row: everything that decides a tile, and nothing that changes with the batch."""
    s = shape
    return (
        f"{kernel} C{s.channels} n{s.units} r{s.rank} k{s.kernel[0]}x{s.kernel[1]} "
        f"s{s.stride[0]}x{s.stride[1]} {s.bits}bit"
    )


def shared_bytes(kernel: str, shape: Shape, tile: Tile) -> int:
    """Shared memory of a tile, modelled: the operands of its products, once for each pipeline stage. AOT
    reports have the truth.
    """
    t, size = dict(tile.blocks), shape.bits // 8
    stages = max(1, tile.stages)
    if kernel in ("prepare", "prepare_backward"):
        return stages * (t["BM"] + t["BN"]) * t["BK"] * size
    if kernel in ("contracted", "contracted_kept"):
        columns = t["BO"] * shape.R
        return stages * max((t["BM"] + columns) * t["BK"], columns * t["BR"]) * size
    if kernel == "generated":
        columns, resident = t["BO"] * t["BD"], t["BR"] == shape.R
        return (
            t["BM"] * t["BR"] * (1 if resident else stages) + (t["BM"] * t["BD"] + columns * t["BR"]) * stages
        ) * size
    if kernel == "grad_z":
        return (stages * t["BR"] * max(t["BK"], t["BU"]) + t["BM"] * max(t["BK"], t["BU"])) * size
    if kernel == "fold":
        return (stages * max(t["BR"], t["BE"]) * t["BC"] + t["BM"] * max(t["BR"], t["BE"])) * size
    return stages * t["BP"] * (t["BN"] + t["BR"] + t["BO"]) * size


def _limits(kernel: str, s: Shape) -> dict[str, tuple[int, int, int]]:
    """{block: (least, most, number it must divide)}, all powers of two. What is padded to whole blocks limits
    the blocks: units to 16, pixels to 64 (``layer.whole_blocks``), ranks to R, patches to K; a product of
    tensor cores takes 16 at least.
    """
    any_size = 1 << 30
    units = (1, power_of_two(s.units), 16)
    pixels, depth, ranks = (16, 256, any_size), (16, 128, s.K), (16, 256, s.R)
    summed, window = (16, 64, 64), (16, max(16, power_of_two(s.K)), any_size)
    return {
        "prepare": dict(BM=pixels, BN=(16, power_of_two(s.R + s.padded_units), any_size), BK=depth),
        "prepare_backward": dict(BM=pixels, BN=(16, s.R, any_size), BK=depth),
        "contracted": dict(BM=pixels, BO=units, BK=depth, BR=ranks),
        "contracted_kept": dict(BM=pixels, BO=units, BK=depth, BR=ranks),
        "generated": dict(BM=pixels, BO=units, BD=depth, BR=ranks),
        "grad_z": dict(BM=pixels, BR=ranks, BK=depth, BU=ranks),
        "fold": dict(
            BM=pixels,
            BC=(16, max(16, power_of_two(s.CP)), any_size),
            BR=ranks,
            BE=(16, 128, math.gcd(s.R, s.padded_units)),
        ),
        "sums": dict(BO=units, BR=ranks, BN=window, BP=summed),
    }[kernel]


@functools.lru_cache(4096)
def splits(kernel_tiles: int, pixels: int, block: int, device: Device) -> int:
    """In how many parts a sum over pixels is taken, each at least 8 blocks long: the number with the least
    steps, program after program on a processor, where a part costs about 14 more (filling the pipeline,
    writing its result and reading it again).
    """
    blocks = -(-pixels // block)
    steps = lambda parts: -(-kernel_tiles * parts // device.processors) * (-(-blocks // parts) + 14)
    most = max(1, min(-(-4 * device.processors // kernel_tiles), pixels // (8 * block)))
    return min(range(1, most + 1), key=steps)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


# From the wanted size down to one that fits anywhere; warps and stages last. What decided the first ones:
# registers and tensor-core clocks of compiled code (bench/results/aot_*.json), to be replaced by rows
# measured on devices.
_SIZES = {
    # BM, most of BN
    "prepare": [(128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (32, 16, 4, 1)],
    "prepare_backward": [(64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (32, 16, 4, 1)],
    # BM, columns of the accumulator (BO R)
    "contracted": [
        (128, 256, 8, 3),
        (128, 128, 8, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
        (32, 32, 4, 1),
        (16, 16, 4, 1),
    ],
    # BM, BO R; the stores of the contraction need registers
    "contracted_kept": [(128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)],
    # BM, columns (BO BD), most of BR
    "generated": [
        (128, 128, 256, 8, 2),
        (128, 64, 256, 8, 1),
        (64, 64, 64, 4, 2),
        (64, 64, 64, 4, 1),
        (32, 16, 16, 4, 1),
    ],
    # BM, BR, most of BK and BU, the latter 32 at most: with 64 of both, Triton 3.8 makes wgmma that ptxas
    # serialises
    "grad_z": [(128, 64, 64, 4, 3), (64, 64, 32, 4, 2), (64, 32, 32, 4, 1), (32, 16, 16, 4, 1)],
    # BM, most of BC, most of BR: with 64 ranks at once up to 57 spills
    "fold": [
        (128, 64, 32, 4, 3),
        (128, 64, 32, 8, 3),
        (64, 64, 32, 8, 2),
        (64, 32, 32, 4, 2),
        (32, 16, 16, 4, 1),
    ],
    # rows (BO BR), BN, BP: 256 x 128 takes fewer registers, but Triton before 3.9 makes wgmma of it that
    # ptxas serialises
    "sums": [
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (256, 64, 64, 8, 2),
        (128, 64, 32, 4, 2),
        (64, 64, 32, 4, 2),
        (64, 32, 32, 4, 1),
        (16, 16, 16, 4, 1),
    ],
}
# Where to begin in these lists: float32 operands take twice the room, and the first size spills on some
# architectures
_BEGIN = {
    "prepare": {"float32": 2, 80: 1},
    "prepare_backward": {"float32": 2, 100: 1},
    "contracted": {"float32": 2, 80: 1, 100: 1, "amd": 1},
    "contracted_kept": {"float32": 2},
    "generated": {"float32": 2},
    "grad_z": {"float32": 1},
    "fold": {"float32": 3, 80: 1, 100: 2},
    "sums": {"float32": 5, 80: 2, 100: 2, "amd": 3},
}


def _family(arch):
    """Architectures whose kernels compile alike: 80 (mma.sync, the rest of NVIDIA's), 90 (wgmma), 100
    (tcgen05), "amd".
    """
    return "amd" if isinstance(arch, str) else {90: 90, 100: 100, 103: 100}.get(arch, 80)


def _heuristic(kernel: str, s: Shape, device: Device) -> list[Tile]:
    if kernel not in _SIZES:
        raise ValueError(f"kernel: expected one of {', '.join(_SIZES)}, got {kernel!r}")
    begin = _BEGIN.get(kernel, {})
    first = max(begin.get("float32", 0) if s.bits == 32 else 0, begin.get(_family(device.arch), 0))
    return [_tile(kernel, s, *size) for size in _SIZES[kernel][first:]]


def _tile(kernel, s, *size):
    """One entry of ``_SIZES`` cut to the layer."""
    *size, warps, stages = size
    units, width = power_of_two(s.units), max(16, power_of_two(s.K))
    make = functools.partial(Tile.make, warps, stages)
    if kernel in ("prepare", "prepare_backward"):
        rows = s.R + (s.padded_units if s.bias and kernel == "prepare" else 0)
        return make(
            BM=size[0],
            BN=min(size[1], max(16, power_of_two(rows))),
            BK=s.block_k if s.bits == 16 else min(32, s.block_k),
        )
    if kernel in ("contracted", "contracted_kept"):
        depth = s.block_k if s.bits == 16 else min(32, s.block_k)
        return make(BM=size[0], BO=max(1, min(units, size[1] // s.R)), BK=depth, BR=min(s.R, 32))
    if kernel == "generated":
        depth = min(64, s.block_k, size[1])
        return make(BM=size[0], BO=max(1, min(units, size[1] // depth)), BD=depth, BR=min(s.R, size[2]))
    if kernel == "grad_z":
        return make(
            BM=size[0], BR=min(s.R, size[1]), BK=min(size[2], s.block_k), BU=min(s.R, size[2], 32, s.block_k)
        )
    if kernel == "fold":
        return make(BM=size[0], BC=min(size[1], max(16, power_of_two(s.CP))), BR=min(s.R, size[2]), BE=16)
    # columns past the window are wasted; fewer at a time need their rows made more often
    columns = min(
        (n for n in (256, 128, 64, 32, 16) if n <= min(size[1], width)), key=lambda n: -(-s.K // n) * (n + 64)
    )
    ranks, rows = min(s.R, 64, size[0]), size[0] * (2 if columns < min(size[1], width) else 1)
    return make(BO=max(1, min(units, 16, rows // ranks)), BR=ranks, BN=columns, BP=size[2])


def verified(capability: tuple[int, int], hip: str | None = None) -> bool:
    """Whether the kernels' tests have passed on a GPU of this compute capability, by the table that such a
    run leaves in the package.
    """
    return not hip and bool(_read_table(capability[0] * 10 + capability[1]).get("verified"))


def _table(arch: int | str) -> dict[str, Tile]:
    """Measured rows for a device: {row_key: Tile}."""
    return _read_table(arch)["tiles"]


@functools.cache
def _read_table(arch: int | str) -> dict:
    """What was measured on a kind of device, its tiles by key. CODA_FAST_TABLES names another folder of
    tables than the package's.

    {"verified": {"device", "triton", "torch", "commit", "date"} where all tests passed, "tiles": [{"key",
    "blocks", "warps", "stages"}]}
    """
    path = (
        pathlib.Path(os.environ.get("CODA_FAST_TABLES", TABLES))
        / f"{arch if isinstance(arch, str) else f'sm_{arch}'}.json"
    )
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tiles = {
        row["key"]: Tile.make(row["warps"], row["stages"], **row["blocks"]) for row in found.get("tiles", [])
    }
    return found | {"tiles": tiles}
