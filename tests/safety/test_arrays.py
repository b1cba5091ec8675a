""".npz files from others: headers that claim too much, compression bombs, arrays that are not images."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from support_safety import npy, refusal, write_inputs, write_npz

from coda_fast import safety


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path / "in")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (npy((10**12, 8, 8)), r"images.npy claims 64000000000128 bytes, the file holds 128"),
        (npy((2**62, 8, 8)), "claims"),
        (npy((4, 8, 8), payload=bytes(100)), "claims 384 bytes, the file holds 228"),
        (npy((4, 8, 8), "<U99999999"), "claims"),
        (npy((4,), "|O"), "Object arrays cannot be loaded"),
        (b"", "images: expected an array, got other bytes"),
    ],
)
def test_arrays_that_claim_another_size(inputs, tmp_path, capsys, images, message):
    path = write_npz(tmp_path / "x.npz", images=images, labels=npy((4,), "<i8", bytes(32)))
    with pytest.raises(ValueError, match=message):
        safety.read_npz(path)["images"] + 0
    options = ("--checkpoint", inputs / "net.safetensors", "--output", tmp_path / "out")
    assert "data: " in refusal(capsys, "evaluate", "--data", path, *options)
    assert not (tmp_path / "out").exists()


def test_arrays_that_are_compressed_beyond_all_memory(tmp_path, monkeypatch):
    path = write_npz(
        tmp_path / "x.npz", zipfile.ZIP_DEFLATED, images=npy((50_000_000,), payload=bytes(50_000_000))
    )
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 10 << 20)
    with pytest.raises(
        safety.TooLarge,
        match="x.npz: arrays: expected what fits into the .* GiB of this machine, got what needs 0.0466",
    ):
        safety.read_npz(path)


def test_arrays_as_numpy_reads_them(tmp_path):
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "b": np.array(["x", "y"]),
        "c": np.zeros(0),
        "d": np.float32(3),
        "train_x": np.ones(2),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = safety.read_npz(tmp_path / "x.npz", lambda name: not name.startswith("train_"))
    assert found.keys() == arrays.keys() - {"train_x"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((), np.uint8)}, "expected images"),
        ({"labels": np.array(["a"] * 4)}, "expected labels that are integers from 0 on, got <U1"),
        ({"labels": np.full(4, np.nan)}, "expected labels that are integers from 0 on, got float64 from nan"),
        ({"labels": np.zeros((4, 2), int)}, "expected images"),
        ({"labels": np.full(4, 2**62)}, "labels up to"),
        (
            {"images": np.zeros((4, 0, 8), np.uint8)},
            "expected images [N, H, W, C] uint8 and as many labels, got uint8 [4, 0, 8]",
        ),
    ],
)
def test_arrays_that_are_no_images(inputs, tmp_path, capsys, changes, message):
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)} | changes
    np.savez(tmp_path / "x.npz", **arrays)
    options = (
        "--checkpoint",
        inputs / "net.safetensors",
        "--output",
        tmp_path / "out",
        "--metric",
        "removal",
    )
    assert message in refusal(
        capsys, "evaluate", "--data", tmp_path / "x.npz", "--metric", "removal", *options
    )


@pytest.mark.parametrize("key", ["test_offset", "test_label", "test_lossless_idx", "test_lossless_rgb"])
@pytest.mark.parametrize(
    "value",
    [np.zeros(()), np.array(["x"]), np.full((2, 2, 2), 10**15), np.full(2, np.inf)],
    ids=["0-d", "text", "3-d", "inf"],
)
def test_jpegs_that_do_not_fit(inputs, tmp_path, capsys, key, value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    raw = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays = {
        "test_jpeg": np.concatenate([raw, raw]),
        "test_offset": np.arange(3) * len(raw),
        "test_label": np.arange(2),
        "test_lossless_idx": np.array([0]),
        "test_lossless_rgb": np.zeros((1, 8, 8, 3), np.uint8),
    }
    np.savez(tmp_path / "x.npz", **(arrays | {key: value}))
    options = (
        "--checkpoint",
        inputs / "net.safetensors",
        "--output",
        tmp_path / "out",
        "--metric",
        "removal",
    )
    line = refusal(capsys, "evaluate", "--data", tmp_path / "x.npz", *options)
    fit = (
        "expected test_jpeg, test_offset and test_label that fit (and test_lossless_idx with "
        "test_lossless_rgb): expected"
    )
    assert fit in line or (
        key == "test_label" and "expected labels of test that are integers from 0 on, got" in line
    )
