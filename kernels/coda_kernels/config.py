"""Launch configuration: a pure function of shape, dtype and device. Nothing here runs a kernel, needs a GPU,
or depends on the batch.

`candidates` lists tiles, from the preferred one down to one that fits anywhere; if the package has a table of
measurements for the device, the measured tile comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import pkgutil
import re
import types
from collections.abc import Callable

TABLES = pathlib.Path(__file__).parent / "tables"

# The most bytes of shared memory per program. NVIDIA: the programming guide's "maximum amount of shared
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
    """What configuration needs to know of a device: ``arch``, NVIDIA's compute capability as 80, 90, ... or
    AMD's "gfx942", and the number of multiprocessors, for splitting sums.
    """

    arch: int | str
    processors: int = 4

    @property
    def shared_bytes(self) -> int:
        """The most bytes of shared memory per program."""
        return SHARED_BYTES.get(self.arch, 65_536)

    @property
    def amd(self) -> bool:
        """Whether it is an AMD GPU."""
        return isinstance(self.arch, str)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer as the kernels see it: everything that is fixed when they are compiled."""

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
        """Channels, rounded up to a multiple of 8, so that a row of a padded image is whole 16-byte words."""
        return -(-self.channels // 8) * 8

    @functools.cached_property
    def R(self) -> int:
        """Rank, rounded up to a power of two that a tensor core takes; above 256 to a multiple of 256."""
        return max(16, power_of_two(self.rank)) if self.rank <= 256 else -(-self.rank // 256) * 256

    @functools.cached_property
    def taps(self) -> int:
        """Positions in a window, kh kw."""
        return self.kernel[0] * self.kernel[1]

    @functools.cached_property
    def block_k(self) -> int:
        """Step of the loop over a window: the longest that pads a window by at most an eighth, but at least
        16, for the tensor cores.
        """
        depth = self.taps * self.CP
        return next(b for b in (64, 32, 16) if b == 16 or -(-depth // b) * b * 8 <= depth * 9)

    @functools.cached_property
    def K(self) -> int:
        """Numbers in a packed window (kh, kw, CP), rounded up to whole steps."""
        return -(-self.taps * self.CP // self.block_k) * self.block_k

    @functools.cached_property
    def units_padded(self) -> int:
        """Units, rounded up to whole blocks of 16, so that the kernels read them without masks."""
        return -(-self.units // 16) * 16

    @functools.cached_property
    def prepared(self) -> int:
        """Numbers in the packed parameters [n' R + R + n', K] and the float32 scales [n] after them."""
        rows = self.units_padded * self.R + self.R + (self.units_padded if self.bias else 0)
        return rows * self.K + self.units * 32 // self.bits

    @functools.cached_property
    def generated(self) -> bool:
        """Whether the forward pass generates w in registers; otherwise it contracts A_o u_p with z
        (docs/kernels.md: two exact forms).
        """
        return self.R >= 128 or self.channels * self.taps <= 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes, by the names of the kernel's arguments, and the numbers of warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @classmethod
    def make(cls, warps: int, stages: int, **blocks: int) -> Tile:
        """A tile from its block sizes by name."""
        return cls(tuple(blocks.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @functools.cached_property
    def options(self) -> dict:
        """The keyword arguments of a launch."""
        # fused multiply-add is requested explicitly: its default changes from on to off in Triton 3.10
        return {
            **dict(self.blocks),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class KernelSpec:
    """What configuration knows about a kernel; each is defined beside its kernel."""

    name: str  # in keys of tables, and in warnings
    # From the preferred size down to one that fits anywhere; warps and stages are last. The first ones were
    # chosen by registers and tensor-core clocks of compiled code (bench/results/aot_*.json), to be replaced
    # by measurements on devices.
    sizes: tuple[tuple[int, ...], ...]
    # (shape, *size) -> the blocks of one of these sizes, cut to the layer
    blocks: Callable[..., dict[str, int]]
    # {block: (least, most, number that it must divide)}, all powers of two: the block sizes with which the
    # kernel, which reads whole blocks without masks, computes correctly
    limits: Callable[[Shape], dict[str, tuple[int, int, int]]]
    # (shape, blocks, stages) -> a model of the bytes of shared memory: the operands of its products, once for
    # each pipeline stage. Ahead-of-time reports have the true number.
    shared_bytes: Callable[[Shape, dict[str, int], int], int]
    # (shape, blocks) -> numbers in the accumulator of a program
    accumulators: Callable[[Shape, dict[str, int]], int]
    # The first of ``sizes`` to consider, if not the first of all: for "float32", whose operands take twice
    # the space, and for families of architectures on which larger ones spill registers
    begin: dict[str | int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if unknown := [size for size in self.begin.values() if size not in self.sizes]:
            raise ValueError(f"begin of {self.name}: expected sizes among {self.sizes}, got {unknown[0]}")

    def tiles(self, shape: Shape, device: Device) -> list[Tile]:
        """The sizes for this layer and device, cut to the layer, the preferred one first."""
        begin = [
            self.begin.get(_family(device.arch)),
            self.begin.get("float32") if shape.bits == 32 else None,
        ]
        first = max(0 if size is None else self.sizes.index(size) for size in begin)
        return [
            Tile.make(warps, stages, **self.blocks(shape, *size))
            for *size, warps, stages in self.sizes[first:]
        ]

    def right(self, shape: Shape, tile: Tile) -> bool:
        """Whether the kernel computes correctly with these blocks."""
        limits, blocks = self.limits(shape), dict(tile.blocks)
        return limits.keys() == blocks.keys() and all(
            least <= blocks[name] <= most and multiple % blocks[name] == 0
            for name, (least, most, multiple) in limits.items()
        )

    def fits(self, shape: Shape, device: Device, tile: Tile) -> bool:
        """Whether the device has the shared memory that these blocks need, by the model."""
        return self.shared_bytes(shape, dict(tile.blocks), max(1, tile.stages)) <= device.shared_bytes

    def row_key(self, shape: Shape) -> str:
        """The key of a table row: everything that determines a tile, and nothing that changes with the batch.
        bfloat16 and float16 share rows.
        """
        s = shape
        return (
            f"{self.name} C{s.channels} n{s.units} r{s.rank} k{s.kernel[0]}x{s.kernel[1]} "
            f"s{s.stride[0]}x{s.stride[1]} {s.bits}bit"
        )


_ROW_KEY_EXAMPLE = "generated C64 n64 r64 k3x3 s1x1 16bit"
_ROW_KEY = re.compile(r"\w+ C\d+ n\d+ r\d+ k\d+x\d+ s\d+x\d+ (16|32)bit")


@functools.cache
def kernel_specs() -> dict[str, KernelSpec]:
    """The specs of all kernels that have a choice of tiles, by name, as the modules of this package define
    them.

    >>> list(kernel_specs())
    ['contracted', 'contracted_kept', 'fold', 'generated', 'grad_z', 'parameter_sums', 'prepare',
    'prepare_backward']
    """
    found = [spec for module in modules() for spec in vars(module).values() if isinstance(spec, KernelSpec)]
    return {spec.name: spec for spec in found}


@functools.cache
def modules() -> tuple[types.ModuleType, ...]:
    """The modules of this package that hold kernels, in a fixed order. They need Triton."""
    found = [
        importlib.import_module(f"{__package__}.{m.name}")
        for m in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)])
    ]
    return tuple(module for module in found if "triton" in vars(module) and module.__name__ != __name__)


def candidates(spec: KernelSpec, shape: Shape, device: Device) -> tuple[Tile, ...]:
    """Tiles for a kernel, the preferred one first, each further one needing less of the device; at least one.

    >>> from coda_kernels.contracted import SPEC
    >>> candidates(SPEC, Shape(64, 64, 64, (3, 3)), Device(90))[0]
    Tile(blocks=(('BM', 128), ('BO', 4), ('BK', 64), ('BR', 32)), warps=8, stages=3)
    """
    fitting, table = _fitting(spec, shape, device), _table(device.arch)
    measured = table.get(spec.row_key(shape)) if table else None
    if measured is None:
        return fitting
    if not spec.right(shape, measured):
        raise ValueError(
            f"{_table_path(device.arch)}: row {spec.row_key(shape)!r}: expected blocks within "
            f"{spec.limits(shape)}, got {measured}"
        )
    return tuple(dict.fromkeys((measured, *fitting)))


@functools.lru_cache(4096)  # every launch calls it, so it must cost the host next to nothing
def _fitting(spec, shape, device):
    wanted = spec.tiles(shape, device)
    return tuple(dict.fromkeys(t for t in wanted if spec.fits(shape, device, t))) or (wanted[-1],)


@functools.lru_cache(4096)
def splits(kernel_tiles: int, pixels: int, block: int, device: Device) -> int:
    """The number of parts into which a sum over pixels is split, each at least 8 blocks long. It minimises
    the steps of the programs that run one after another on a multiprocessor; a part costs about 14 steps more
    than its blocks (filling the pipeline, writing its result and reading it again).
    """
    blocks = -(-pixels // block)
    steps = lambda parts: -(-kernel_tiles * parts // device.processors) * (-(-blocks // parts) + 14)
    most = max(1, min(-(-4 * device.processors // kernel_tiles), pixels // (8 * block)))
    return min(range(1, most + 1), key=steps)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _family(arch):
    """The family of architectures whose kernels compile alike: 90 (wgmma), 100 (tcgen05), 80 (mma.sync, all
    other NVIDIA GPUs), "amd".
    """
    return "amd" if isinstance(arch, str) else {90: 90, 100: 100, 103: 100}.get(arch, 80)


# -- limits that several kernels share: padding to whole blocks limits the size of blocks. Units are padded to
# 16, pixels to 64 (``layer.whole_blocks``), ranks to R, windows to K; tensor cores multiply at least 16.

ANY_SIZE = 1 << 30
PIXELS = (16, 256, ANY_SIZE)


def unit_limits(s: Shape) -> tuple[int, int, int]:
    """The limits of a block of units."""
    return 1, power_of_two(s.units), 16


def depth_limits(s: Shape) -> tuple[int, int, int]:
    """The limits of a step along a window."""
    return 16, 128, s.K


def rank_limits(s: Shape) -> tuple[int, int, int]:
    """The limits of a block of ranks."""
    return 16, 256, s.R


def verified(capability: tuple[int, int], hip: str | None = None) -> bool:
    """Whether the kernels' tests have passed on a GPU of this compute capability, according to the table that
    such a test run leaves in the package.
    """
    return not hip and bool(_read_table(capability[0] * 10 + capability[1]).get("verified"))


def _table(arch: int | str) -> dict[str, Tile]:
    """Measured rows for a device: {row_key: Tile}."""
    return _read_table(arch)["tiles"]


@functools.cache
def _read_table(arch: int | str) -> dict:
    """The table of measurements for a kind of device, with its tiles by key.

    As JSON it is {"verified": {"device", "triton", "torch", "commit", "date"} if all tests passed, "tiles":
    [{"key", "blocks", "warps", "stages"}]}.
    """
    path = _table_path(arch)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = found.get("tiles", [])
    if wrong := [row["key"] for row in rows if not _ROW_KEY.fullmatch(row["key"])]:
        raise ValueError(f"{path}: expected keys like {_ROW_KEY_EXAMPLE!r}, got {wrong[0]!r}")
    if unknown := {row["key"].split()[0] for row in rows} - kernel_specs().keys():
        raise ValueError(f"{path}: expected kernels among {', '.join(kernel_specs())}, got {min(unknown)!r}")
    return found | {
        "tiles": {row["key"]: Tile.make(row["warps"], row["stages"], **row["blocks"]) for row in rows}
    }


def _table_path(arch: int | str) -> pathlib.Path:
    """The path of the table for a kind of device: in the folder CODA_FAST_TABLES, else in the package."""
    folder = os.environ.get("CODA_FAST_TABLES")
    if folder is not None and not pathlib.Path(folder).is_dir():
        raise ValueError(f"CODA_FAST_TABLES: expected a folder of tables, got {folder!r}")
    return pathlib.Path(folder or TABLES) / f"{arch if isinstance(arch, str) else f'sm_{arch}'}.json"
