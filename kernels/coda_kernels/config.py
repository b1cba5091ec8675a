"""Launch configuration: a pure function of shape, dtype and device. Nothing here runs a kernel, needs a GPU, or depends on the batch.

`candidates` lists tiles from the wanted one down to one that fits anywhere; a table of measured rows for the device, where the package
has one, puts its tile in front.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib

TABLES = pathlib.Path(__file__).parent / "tables"

# Shared memory that a program may have, bytes. NVIDIA: the programming guide's "maximum amount of shared memory per thread block".
SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376, "gfx942": 65_536}


@dataclasses.dataclass(frozen=True)
class Device:
    """What configuration depends on: NVIDIA's compute capability as 80, 90, ... or AMD's "gfx942"; processors for splitting sums."""

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

    @property
    def CP(self) -> int:
        """Channels, rounded up to 8 so that a row of a canvas is whole 16-byte words."""
        return -(-self.channels // 8) * 8

    @property
    def R(self) -> int:
        """Rank, rounded up to a power of two that a tensor core takes; above 256 to a multiple of 256."""
        return max(16, power_of_two(self.rank)) if self.rank <= 256 else -(-self.rank // 256) * 256

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def block_k(self) -> int:
        """Step of the loop over a patch: the longest that pads a patch by at most an eighth."""
        depth = self.taps * self.CP
        return next(b for b in (64, 32, 16, 8) if b == 8 or -(-depth // b) * b * 8 <= depth * 9 or (b == 16 and depth < 64))

    @property
    def K(self) -> int:
        """Numbers in a packed patch (kh, kw, channels), rounded up to whole steps."""
        return -(-self.taps * self.CP // self.block_k) * self.block_k

    @property
    def generated(self) -> bool:
        """Whether the forward pass generates w in registers; else it contracts the product with z (design: the two exact forms)."""
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

    def options(self) -> dict:
        """Keyword arguments of a launch."""
        # fusing multiplies with adds is asked for explicitly: its default goes from on to off in Triton 3.10
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


KERNELS = ("project", "norm_factor", "contracted", "generated", "grad_factors", "gram", "grad_z", "fold", "outer_scaled", "outer_plain")


def candidates(kernel: str, shape: Shape, device: Device) -> tuple[Tile, ...]:
    """Tiles for ``kernel``, the wanted one first, each of the others needing less of the device; at least one.

    >>> candidates("contracted", Shape(64, 64, 64, (3, 3)), Device(90))[0]
    Tile(blocks=(('BM', 128), ('BO', 4), ('BK', 64), ('BR', 32)), warps=8, stages=3)
    """
    wanted = _heuristic(kernel, shape, device)
    fitting = [tile for tile in wanted if shared_bytes(kernel, shape, tile) <= device.shared_bytes] or [wanted[-1]]
    measured = _table(device.arch).get(row_key(kernel, shape))
    return tuple(dict.fromkeys(([measured] if measured else []) + fitting))


def row_key(kernel: str, shape: Shape) -> str:
    """The key of a table row: everything that decides a tile, and nothing that changes with the batch."""
    s = shape
    return f"{kernel} C{s.channels} n{s.units} r{s.rank} k{s.kernel[0]}x{s.kernel[1]} s{s.stride[0]}x{s.stride[1]} {s.bits}bit"


def shared_bytes(kernel: str, shape: Shape, tile: Tile) -> int:
    """Shared memory of a tile, modelled: the operands of its products, once for each pipeline stage. AOT reports have the truth."""
    t, size = dict(tile.blocks), shape.bits // 8
    stages = max(1, tile.stages)
    if kernel == "project":
        return stages * (t["BM"] + t["BN"]) * t["BK"] * size
    if kernel == "contracted":
        columns = t["BO"] * shape.R
        return stages * max((t["BM"] + columns) * t["BK"], columns * t["BR"]) * size
    if kernel == "generated":
        columns, resident = t["BO"] * t["BD"], t["BR"] == shape.R
        return (t["BM"] * t["BR"] * (1 if resident else stages) + (t["BM"] * t["BD"] + columns * t["BR"]) * stages) * size
    if kernel == "grad_z":
        return (stages * t["BR"] * max(t["BK"], t["BU"]) + t["BM"] * max(t["BK"], t["BU"])) * size
    if kernel == "fold":
        return (stages * max(t["BR"], t["BE"]) * t["BC"] + t["BM"] * max(t["BR"], t["BE"])) * size
    if kernel in ("outer_scaled", "outer_plain"):
        return stages * t["BP"] * (t["BN"] + t["BR"] + t["BO"]) * size
    if kernel == "gram":
        return stages * 2 * t["BR"] * t["BK"] * size
    return 2 * shape.R * t["BK"] * 8 if kernel == "norm_factor" else 0


def splits(kernel_tiles: int, pixels: int, block: int, device: Device) -> int:
    """In how many parts a sum over pixels is taken: about two programs a processor, each at least 8 blocks long."""
    return max(1, min(-(-2 * device.processors // kernel_tiles), pixels // (8 * block)))


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def _heuristic(kernel: str, s: Shape, device: Device) -> list[Tile]:
    half = s.bits == 16
    if kernel == "project":
        width = min(128, max(16, power_of_two(s.R + (-(-s.units // 16) * 16 if s.bias else 0))))
        sizes = [(128, width, 4, 3), (64, min(64, width), 4, 2), (32, 16, 4, 1)]
        return [Tile.make(w, st, BM=m, BN=n, BK=s.block_k) for m, n, w, st in sizes[0 if half else 1 :]]
    if kernel == "contracted":
        # 128 x 256 with 8 warps: 206 registers on sm_90; half the columns where float32 operands take twice the room
        sizes = [(128, 256, 8, 3), (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)]
        if device.amd:
            sizes = sizes[1:]
        units = power_of_two(s.units)
        block = s.block_k if half else min(32, s.block_k)
        return [Tile.make(w, st, BM=m, BO=max(1, min(units, c // s.R)), BK=block, BR=min(s.R, 32)) for m, c, w, st in sizes[0 if half else 2 :]]
    if kernel == "generated":
        width, rank = min(64, s.block_k), min(s.R, 256)
        sizes = [(128, 2 * width, 256, 8, 2), (128, width, 256, 8, 1), (64, width, 128, 4, 2), (64, width, 64, 4, 1), (32, 16, 16, 4, 1)]
        tiles = []
        for m, c, r, w, st in sizes[0 if half else 2 :]:
            depth = min(width, c)
            tiles.append(Tile.make(w, st, BM=m, BO=max(1, min(power_of_two(s.units), c // depth)), BD=depth, BR=min(rank, r)))
        return tiles
    if kernel == "grad_z":
        sizes = [(128, 64, 64, 4, 3), (64, 64, 64, 4, 2), (64, 32, 32, 4, 1), (32, 16, 16, 4, 1)]
        return [
            Tile.make(w, st, BM=m, BR=min(s.R, r), BK=min(k, s.block_k), BU=min(s.R, k)) for m, r, k, w, st in sizes[0 if half else 1 :]
        ]
    if kernel == "fold":
        width = min(64, max(16, power_of_two(s.CP)))
        sizes = [(128, width, 32, 4, 3), (64, width, 32, 4, 2), (64, min(32, width), 32, 4, 1), (32, 16, 16, 4, 1)]
        return [Tile.make(w, st, BM=m, BC=c, BR=min(s.R, r), BE=16) for m, c, r, w, st in sizes[0 if half else 1 :]]
    if kernel == "outer_scaled":
        sizes = [(256, 128, 64, 8, 3), (256, 64, 64, 8, 2), (128, 64, 32, 4, 2), (64, 32, 32, 4, 1), (16, 16, 16, 4, 1)]
        tiles = []
        for rows, n, p, w, st in sizes[0 if half else 2 :]:
            rank = min(s.R, 64, rows)
            units = max(1, min(power_of_two(s.units), rows // rank))
            tiles.append(Tile.make(w, st, BO=units, BR=rank, BN=min(n, max(16, power_of_two(s.K))), BP=p))
        return tiles
    if kernel == "outer_plain":
        sizes = [(64, 128, 64, 4, 3), (64, 64, 32, 4, 2), (16, 16, 16, 4, 1)]
        return [Tile.make(w, st, BO=1, BR=r, BN=min(n, max(16, power_of_two(s.K))), BP=p) for r, n, p, w, st in sizes[0 if half else 1 :]]
    if kernel == "gram":
        return [Tile.make(4, 2, BR=min(64, s.R), BK=s.block_k), Tile.make(4, 1, BR=16, BK=min(16, s.block_k))]
    if kernel == "norm_factor":
        return [Tile.make(8, 1, BK=min(16 if s.bits == 32 else 32, s.block_k))]
    if kernel == "grad_factors":
        return [Tile.make(4, 1, BP=64, BO=16)]
    raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")


@functools.cache
def _table(arch: int | str) -> dict[str, Tile]:
    """Measured rows for a device: {row_key: Tile}. CODA_FAST_TABLES names another folder of tables."""
    path = pathlib.Path(os.environ.get("CODA_FAST_TABLES", TABLES)) / f"{arch if isinstance(arch, str) else f'sm_{arch}'}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    return {row["key"]: Tile.make(row["warps"], row["stages"], **row["blocks"]) for row in rows}
