"""The launch configuration is a pure function of shape, dtype and device, and always returns a configuration
that fits.
"""

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_kernels import L_LAYERS, S_LAYERS, layer_tensors

from coda_fast.functional import dau_conv2d
from coda_kernels import config
from coda_kernels.config import Device, Shape, Tile, candidates

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, "gfx942", "gfx950", 75)
SPECS = config.kernel_specs()
KERNELS = tuple(SPECS)


def shape(channels, units, rank, kernel, stride=1, bits=16):
    return Shape(channels, units, rank, (kernel, kernel), (stride, stride), bits=bits)


@pytest.mark.parametrize("layer", [*S_LAYERS, *L_LAYERS], ids=str)
def test_the_form_that_wins(layer):
    """The generated form is used where r >= 128 or a patch has at most 64 numbers, and the contracted form
    elsewhere.
    """
    channels, _, rank, kernel, _ = layer
    assert shape(*layer).generated == (rank >= 128 or channels * kernel**2 <= 64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layer_has_tiles_that_fit(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    layer = Shape(
        draw(1, 300),
        draw(1, 1000),
        draw(1, 600),
        (draw(1, 7), draw(1, 7)),
        bias=data.draw(st.booleans()),
        bits=draw(1, 2) * 16,
    )
    device = Device(data.draw(st.sampled_from(ARCHITECTURES)), draw(1, 200))
    assert layer.R >= max(16, layer.rank)
    assert layer.CP >= layer.channels
    assert layer.CP % 8 == 0
    assert layer.K >= layer.taps * layer.CP
    assert layer.K % layer.block_k == 0
    other_form = ("contracted", "contracted_kept") if layer.generated else ("generated",)
    for kernel in set(KERNELS) - set(other_form):
        tiles = candidates(SPECS[kernel], layer, device)
        assert tiles
        assert len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert all(size & (size - 1) == 0 for _, size in tile.blocks), "arange needs powers of two"
            blocks = dict(tile.blocks)
            assert SPECS[kernel].right(layer, tile)
            assert layer.K % blocks.get("BK", 1) == 0
            assert layer.K % blocks.get("BD", 1) == 0
            assert 64 % blocks.get("BP", 1) == 0, "pixels are padded to 64"
            assert blocks.get("BO", 1) <= 16, "units are padded to 16"
        assert all(SPECS[kernel].fits(layer, device, tile) for tile in tiles)


@pytest.mark.parametrize("kernel", KERNELS)
def test_pure(kernel):
    """Equal arguments give equal results. The batch size has no effect, because it is not an argument."""
    layer, device = shape(64, 64, 64, 3), Device(90, 132)
    assert candidates(SPECS[kernel], layer, device) == candidates(
        SPECS[kernel], Shape(64, 64, 64, (3, 3)), Device(90, 132)
    )
    assert hash(candidates(SPECS[kernel], layer, device))
    with pytest.raises(AttributeError):
        candidates(SPECS[kernel], layer, device)[0].warps = 2


def test_splits_depend_on_shape_and_processors_only():
    assert config.splits(80, 16384, 64, Device(90, 132)) == 3  # 240 programs in two turns
    assert config.splits(132, 16384, 64, Device(90, 132)) == 1
    assert config.splits(1, 100, 64, Device(90, 132)) == 1, "too few pixels to split"
    assert config.splits(2, 262144, 64, Device(90, 132)) == 66


def test_a_measured_row_comes_first(tmp_path, monkeypatch):
    layer = shape(64, 64, 64, 3)
    wanted = candidates(SPECS["contracted"], layer, Device(90))
    row = dict(
        key=SPECS["contracted"].row_key(layer), blocks=dict(BM=64, BO=2, BK=32, BR=32), warps=4, stages=4
    )
    (tmp_path / "sm_90.json").write_text(json.dumps({"device": "test", "tiles": [row]}))
    monkeypatch.setenv("CODA_FAST_TABLES", str(tmp_path))
    config._read_table.cache_clear()
    try:
        tiles = candidates(SPECS["contracted"], layer, Device(90))
        assert tiles == (Tile.make(4, 4, BM=64, BO=2, BK=32, BR=32), *wanted)
        assert candidates(SPECS["contracted"], shape(64, 64, 64, 3, bits=32), Device(90))[0] != tiles[0], (
            "rows of another dtype do not count"
        )
        assert candidates(SPECS["fold"], layer, Device(90))[0].stages == 3, "no row, so the heuristic decides"
        assert candidates(SPECS["contracted"], layer, Device(80))[0] != tiles[0], "another device"
        row["blocks"]["BK"] = 128  # half a block would be past the end of a patch of 576 numbers
        (tmp_path / "sm_90.json").write_text(json.dumps({"tiles": [row]}))
        config._read_table.cache_clear()
        with pytest.raises(
            ValueError, match=r"sm_90.json: row 'contracted C64 n64 .*expected blocks within .*BK.*got Tile"
        ):
            candidates(SPECS["contracted"], layer, Device(90))
    finally:
        config._read_table.cache_clear()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("contracted C64 n64 r64 k3x3 s1x1 bf16", r"sm_90.json: expected keys like 'generated C64 .* got 'c"),
        ("sums C64 n64 r64 k3x3 s1x1 16bit", r"sm_90.json: expected kernels among contracted, .* got 'sums'"),
    ],
)
def test_rows_that_nothing_would_read_are_refused(key, message, tmp_path, monkeypatch):
    row = dict(key=key, blocks=dict(BM=64), warps=4, stages=4)
    (tmp_path / "sm_90.json").write_text(json.dumps({"tiles": [row]}))
    monkeypatch.setenv("CODA_FAST_TABLES", str(tmp_path))
    config._read_table.cache_clear()
    with pytest.raises(ValueError, match=message):
        candidates(SPECS["contracted"], shape(64, 64, 64, 3), Device(90))
    monkeypatch.setenv("CODA_FAST_TABLES", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"CODA_FAST_TABLES: expected a folder of tables, got '.*elsewhere'"):
        candidates(SPECS["contracted"], shape(64, 64, 64, 3), Device(90))
    config._read_table.cache_clear()


def test_where_to_begin_is_a_size_of_the_kernel():
    spec = SPECS["fold"]
    with pytest.raises(ValueError, match=r"begin of fold: expected sizes among .*, got \(1, 2, 3\)"):
        dataclasses.replace(spec, begin={"float32": (1, 2, 3)})
    # a further size before the others does not change the size that float32 begins with
    more = dataclasses.replace(spec, sizes=((256, 128, 64, 8, 4), *spec.sizes))
    layer = shape(64, 64, 64, 3, bits=32)
    assert more.tiles(layer, Device(90)) == spec.tiles(layer, Device(90))


def test_verified_only_by_a_table(tmp_path, monkeypatch):
    """ "auto" uses the kernels on a GPU only if a run of all their tests has marked the table."""
    monkeypatch.setenv("CODA_FAST_TABLES", str(tmp_path))
    config._read_table.cache_clear()
    assert not config.verified((9, 0))
    config._read_table.cache_clear()
    (tmp_path / "sm_90.json").write_text(json.dumps({"verified": {"device": "test"}, "tiles": []}))
    try:
        assert config.verified((9, 0))
        assert not config.verified((8, 0))
        assert not config.verified((9, 0), hip="6.4")
    finally:
        config._read_table.cache_clear()


def test_the_next_smaller_tile_is_taken_with_one_warning(monkeypatch):
    """If a device refuses a tile, the next one is used. The refused tile is not tried again, and there is one
    warning.
    """
    import triton

    from coda_kernels import contracted as module
    from coda_kernels import layer

    tried = []

    class Picky:
        def __getitem__(self, grid):
            def launch(*args, **options):
                tried.append(options["BM"])
                if options["BM"] > 64:
                    raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
                return contracted[grid](*args, **options)

            return launch

    contracted = module.contracted
    monkeypatch.setattr(module, "contracted", Picky())
    monkeypatch.setattr(layer, "_first_fitting", {})
    tensors = [t.detach() for t in layer_tensors(16, 4, 5, 3, (4, 4))]
    tensors = [t.to(torch.bfloat16) for t in tensors]
    with pytest.warns(RuntimeWarning, match=r"contracted C16 n4 r5 k3x3 .*out of resource.*next smaller"):
        first = dau_conv2d(*tensors, backend="triton")
    refused = tried.count(128)
    assert refused >= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        second = dau_conv2d(*tensors, backend="triton")
    assert tried.count(128) == refused
    assert torch.equal(first, second)


def test_float32_follows_torchs_setting(monkeypatch):
    from coda_kernels import layer

    monkeypatch.setattr(layer, "interpreted", lambda: False)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert layer.precision(torch.float32, Device(90)) == expected
            assert layer.precision(torch.float32, Device("gfx942")) == "ieee"
            assert layer.precision(torch.bfloat16, Device(90)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
