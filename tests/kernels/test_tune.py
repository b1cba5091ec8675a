"""tools/tune.py without a GPU: the tiles that it tries, the wrong tiles that it finds, and the rows that it
writes.
"""

import dataclasses
import math

import pytest
import torch
from support_kernels import DEVICE, L_LAYERS, S_LAYERS

from coda_kernels import config
from coda_kernels.config import Device, Shape, Tile
from tools import tune

SPECS = config.kernel_specs()
DEVICES = [Device(arch, 132) for arch in (80, 89, 90, 100, "gfx942")]
SMALL = (9, 5, 7, 3, 2, 5, 2)  # C, n, r, k, stride, size, batch


def shapes():
    for channels, units, rank, kernel, stride in (
        *S_LAYERS,
        *L_LAYERS,
        (9, 5, 7, 3, 2),
        (64, 1000, 256, 1, 1),
    ):
        for bits in (16, 32):
            yield Shape(channels, units, rank, (kernel, kernel), (stride, stride), bits=bits)


@pytest.mark.parametrize("kernel", SPECS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_neighbours(kernel, device):
    """The wanted tile comes first. All tiles are distinct, legal and fit, and differ in warps, in stages, or
    in one or two blocks.
    """
    for shape in shapes():
        if kernel == ("contracted" if shape.generated else "generated"):
            continue
        wanted = config.candidates(SPECS[kernel], shape, device)[0]
        found = tune.neighbours(SPECS[kernel], shape, device)
        assert found[0] == wanted
        assert len(set(found)) == len(found) > 1
        for tile in found:
            assert tune.legal(SPECS[kernel], shape, device, tile), (shape, tile)
            assert SPECS[kernel].fits(shape, device, tile)
            assert all(size & (size - 1) == 0 for _, size in tile.blocks)
            assert tile.warps in (4, 8)
            assert tile.stages == wanted.stages or tile.stages in (2, 3, 4)
            changed = sum(a != b for a, b in zip(tile.blocks, wanted.blocks, strict=True))
            assert changed + (tile.warps != wanted.warps) + (tile.stages != wanted.stages) <= 1 + (
                changed == 2
            )


def test_blocks_that_would_read_past_the_end_are_illegal():
    shape, device = Shape(64, 64, 64, (3, 3)), Device(90)
    wanted = config.candidates(SPECS["parameter_sums"], shape, device)[0]
    # 64 pixels per block
    assert not tune.legal(
        SPECS["parameter_sums"], shape, device, Tile.make(8, 2, **dict(wanted.blocks, BP=128, BN=16))
    )
    wanted = config.candidates(SPECS["contracted"], shape, device)[0]
    # 16 units per block
    assert not tune.legal(
        SPECS["contracted"], shape, device, Tile.make(8, 2, **dict(wanted.blocks, BO=32, BM=16))
    )
    # 576 = 4.5 x 128
    assert not tune.legal(
        SPECS["contracted"], shape, device, Tile.make(8, 2, **dict(wanted.blocks, BK=128, BM=16))
    )


def test_search_goes_where_it_is_faster():
    """The search moves several times to a faster tile. It never moves to an infinite time, and an expired
    budget ends it with the best tile so far.
    """
    shape, device = Shape(64, 64, 64, (3, 3)), Device(90)
    job = tune.Job(SPECS["fold"], shape, device, config.candidates(SPECS["fold"], shape, device)[0])
    seen = []

    def measure(tile):
        seen.append(tile)
        return math.inf if tile["BE"] != 16 else 10.0 + abs(math.log2(tile["BM"] / 32)) + abs(tile.stages - 2)

    best, times = tune.search(job, measure)
    assert (best["BM"], best["BE"], best.stages) == (32, 16, 2)
    assert len(seen) == len(set(seen)) == len(times)
    assert tune.search(job, measure, lambda: len(seen) > len(times))[0] == job.wanted


@pytest.fixture(scope="module")
def jobs():
    torch.manual_seed(0)  # this fixture runs before the seed of the first test is set
    return tune.record(SMALL, "float32", DEVICE)


def test_record(jobs):
    """A training step launches every kernel except the other form's, and each launch writes a tensor."""
    # contracted_kept runs only with save_contraction
    assert set(jobs) == set(SPECS) - {"generated", "contracted_kept"}
    assert all(len(job.launches) == 1 for job in jobs.values())
    assert all(launch.outputs or launch.after for job in jobs.values() for launch in job.launches)
    for kernel, job in jobs.items():
        assert job.wanted == config.candidates(SPECS[kernel], job.shape, job.device)[0]
        assert job.key == SPECS[kernel].row_key(job.shape)


@pytest.mark.parametrize("kernel", ["contracted", "grad_z", "parameter_sums", "prepare_backward"])
def test_neighbours_compute_the_same(jobs, kernel):
    job, timed = jobs[kernel], []
    timer = lambda run: timed.append(run()) or float(100 - len(timed))
    lines = []
    row = tune.tune(job, timer, lines.append, expired=lambda: len(timed) >= 5)
    assert len(lines) == 1, lines
    assert row["us"] < row["us_wanted"]


def test_a_wrong_tile_is_left_out(jobs):
    """A tile whose program writes too little, and one that computes something else, are reported as infinite,
    and the tensors are restored.
    """
    job, lines = jobs["fold"], []
    (launch,) = job.launches
    (dx,), run = launch.outputs, launch.run
    intact = dx.clone()
    wrong = {"nothing": lambda tile: None, "twice": lambda tile: [run(tile), dx.mul_(1.01)][0]}
    for name, function in wrong.items():
        launch.run = function
        assert tune.measurer(job, lambda run: 1.0, lines.append)(job.wanted) == math.inf, name
        assert torch.equal(dx, intact)
    launch.run = run
    assert "NaN" in lines[0]
    assert "error 1.0e-02" in lines[1]
    assert tune.measurer(job, lambda run: 1.0, lines.append)(job.wanted) == 1.0


def test_rows_are_read_by_the_package(tmp_path, monkeypatch):
    """``config`` reads the written rows: the measured tile comes first, then those of the heuristic."""
    monkeypatch.setenv("CODA_FAST_TABLES", str(tmp_path))
    shape, device = Shape(64, 64, 64, (3, 3)), Device(90, 132)
    config._read_table.cache_clear()
    before = config.candidates(SPECS["fold"], shape, device)
    tile = Tile.make(8, 4, BM=64, BC=32, BR=16, BE=16)
    table = tune.document([tune.row(SPECS["fold"].row_key(shape), tile, 12.345, 20.0)], "a GPU")
    assert list(table) == ["device", "triton", "torch", "commit", "date", "tiles"]
    tune.write(tmp_path / "sm_90.json", table)
    config._read_table.cache_clear()
    try:
        assert config.candidates(SPECS["fold"], shape, device) == (tile, *before)
        assert config.candidates(SPECS["fold"], dataclasses.replace(shape, bits=32), device)[0] != tile
        assert [p.name for p in tmp_path.iterdir()] == ["sm_90.json"]
    finally:
        config._read_table.cache_clear()
    tune.write(tmp_path / "sm_90.json", table | {"tiles": []})
    assert config._table(90) == {}
    config._read_table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "new.json")]) == 2
    assert capsys.readouterr().err == "tune: needs a CUDA device, torch sees none\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["tables", "existing", "nowhere"])
def test_output_is_a_new_file_elsewhere(place, tmp_path, capsys):
    (tmp_path / "existing").touch()
    path = {
        "tables": config.TABLES / "sm_1.json",
        "existing": tmp_path / "existing",
        "nowhere": tmp_path / "no" / "where",
    }[place]
    with pytest.raises(SystemExit) as stop:
        tune.main(["--output", str(path)])
    assert stop.value.code == 2
    assert "--output: expected" in capsys.readouterr().err
