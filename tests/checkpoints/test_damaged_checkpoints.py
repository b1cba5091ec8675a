"""Checkpoints that are damaged, lie about their content, or are not files: one line names the problem."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import NORM_NAMES
from support_checkpoints import header, two_layer_network

import coda_fast
from coda_fast import CheckpointError, checkpoints


@pytest.fixture
def model():
    return two_layer_network()


def test_bad_files(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such checkpoint"):
        coda_fast.load(tmp_path / "nothing.safetensors")
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello world", whole[:20], whole[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="net.safetensors: "):
            coda_fast.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of coda_fast .*found None"):
        coda_fast.load(path)


def test_weights_that_do_not_fit(model, tmp_path):
    path = tmp_path / "net.safetensors"
    tensors = dict(model.state_dict())
    tensors["layers.0.weight"] = torch.zeros(1, 2, 3)
    tensors["extra"] = tensors.pop("layers.1.bias").contiguous()
    save_file(tensors, path, header(model))
    with pytest.raises(
        CheckpointError,
        match=r"unknown key 'extra'; missing key 'layers.1.bias'; "
        r"'layers.0.weight': expected .* got \[1, 2, 3\]",
    ):
        coda_fast.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config is missing"),
        ("{", "config is missing or not JSON"),
        ("[]", "config: expected a JSON object, got list"),
        ({"widths": 3}, r"unknown entries \['widths'\]"),
        ({"device": "cuda"}, r"unknown entries \['device'\]"),
        ({"out_channels": None}, "does not give a network"),
        ({"strides": None}, "does not give a network"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"logit_bias": "x"}, "logit_bias: expected a number"),
        ({"image_size": -8}, "image_size: expected a positive int"),
        ({"class_names": [1, 2, 3]}, "class_names: expected a list of strings"),
        ({"ranks": [10**13, 5]}, r"'layers.0.weight': expected \[4, 10000000000000, 6, 3, 3\]"),
        ({"image_size": 10**9}, "image_size: expected a positive int, at most 65536, got 1000000000"),
        ({"image_size": 2**70}, r"image_size: expected a positive int, at most 65536, got about 2\*\*70"),
        ({"image_size": 1e9}, "image_size: expected a positive int"),
        ({"image_size": True}, "image_size: expected a positive int"),
        ({"image_channels": "3"}, "image_channels: expected a positive int, got '3'"),
        ({"image_channels": [3]}, "image_channels: expected a positive int"),
        ({"out_channels": "abc"}, "out_channels: expected a list with an entry for each layer, got 'abc'"),
        ({"out_channels": {"4": 1, "3": 2}}, "out_channels: expected a list"),
        ({"out_channels": [[4], 3]}, r"out_channels\[0\]: expected a positive int, got \[4\]"),
        ({"out_channels": [-4, 3]}, r"out_channels\[0\]: expected a positive int, got -4"),
        ({"out_channels": [4] * 10**6}, "expected at least 2 tensors for each of 1000000 layers, got 6"),
        (
            {"out_channels": [2**70, 3]},
            r"weights: expected less than 2\*\*63 bytes for a layer, got about 2\*\*7",
        ),
        (
            {"ranks": [2**62, 2**62]},
            r"weights: expected less than 2\*\*63 bytes for a layer, got about 2\*\*7",
        ),
        ({"kernel_sizes": [2**70, 1]}, r"kernel_sizes\[0\]: expected at most 65536, got about 2\*\*70"),
        ({"kernel_sizes": [[3, 3, 3], 1]}, r"kernel_sizes\[0\]: expected an int or a pair of ints"),
        ({"strides": [10**6, 1]}, r"strides\[0\]: expected at most 65536"),
        ({"paddings": [0, 10**6]}, r"paddings\[1\]: expected at most 65536"),
        ({"paddings": ["reflect", 0]}, 'padding: expected "same", "valid"'),
        ({"dilations": [0, 1]}, r"dilations\[0\]: expected at least 1"),
        ({"dilations": [1]}, "dilations: expected 2 entries"),
        ({"temperature": 10**4000}, "temperature: expected a finite number"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"temperature": float("inf")}, "temperature: expected a finite number"),
        ({"temperature": 1e-300}, "temperature: expected a positive number, at least 1.2e-38"),
        ({"temperature": "7"}, "temperature: expected a number, got '7'"),
        ({"temperature": [7]}, "temperature: expected a number"),
        ({"logit_bias": 1e300}, "logit_bias: expected a finite number"),
        ({"norm": ["l2"]}, "norm: expected 2 entries"),
        ({"norm": ["l2", "l3"]}, f"norm: expected one of {NORM_NAMES}, got 'l3'"),
        ({"eps": [1e-6, float("inf")]}, "eps: expected a finite number"),
        ({"eps": "small"}, "eps: expected a number"),
        ({"bias": "no"}, "bias: expected True or False, got 'no'"),
        ({"bias": [True, None]}, "bias: expected True or False, got None"),
        ({"class_names": "abc"}, "class_names: expected a list of strings, got 'abc'"),
        ({"class_names": ["a"] * 10**6}, "class_names: expected 3 names, one for each class, got 1000000"),
        ({"save_contraction": "x"}, "unknown entries"),
        ({"x" * 10**6: 1}, "unknown entries"),
        ('{"temperature": 1, "temperature": 2}', "a key comes twice"),
        ('{"a":' + "[" * 100_000, "config is missing or not JSON .RecursionError"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "config is missing or not JSON .RecursionError"),
        ('{"image_size": ' + "9" * 5000 + "}", "config is missing or not JSON .ValueError"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_configurations(model, tmp_path, config, message):
    path = tmp_path / "net.safetensors"
    entries = header(model)
    if isinstance(config, dict):
        entries["config"] = json.dumps(model.config() | config)
    elif config is None:
        del entries["config"]
    else:
        entries["config"] = config
    save_file(dict(model.state_dict()), path, entries)
    with pytest.raises(CheckpointError, match=message) as caught:
        coda_fast.load(path)
    assert "net.safetensors: " in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def test_bad_tensors(model, tmp_path):
    path = tmp_path / "net.safetensors"
    for tensors in (
        {k: v.to(torch.int8) for k, v in model.state_dict().items()},
        {**model.state_dict(), "layers.0.bias": torch.zeros(1).double()},
    ):
        save_file(tensors, path, header(model))
        with pytest.raises(CheckpointError, match="expected tensors of one dtype"):
            coda_fast.load(path)


def test_nothing_is_read_before_configuration_and_tensors_agree(model, tmp_path, monkeypatch):
    """Nothing is read either when they agree on more than the memory of the machine."""
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    read = []

    class Watched:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr("safetensors.safe_open", Watched)
    coda_fast.load(path)
    assert len(read) == 6
    read.clear()
    with pytest.raises(CheckpointError, match=r"'layers.0.weight': expected \[4, 9, 6, 3, 3\]"):
        coda_fast.load(path, ranks=[9, 5])
    monkeypatch.setattr("coda_fast.safety.machine_memory", lambda device="cpu": 1000)
    with pytest.raises(ValueError, match=r"weights: expected what fits into the .* of this machine"):
        coda_fast.load(path)
    assert not read


def test_headers_that_lie(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    whole = path.read_bytes()
    for damaged in (
        whole.replace(b'"shape":[4,2,6', b'"shape":[9,2,6'),
        whole.replace(b'"shape":[4,2,6', b'"shape":[-4,2,6'),
        whole.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        for read in (coda_fast.load, checkpoints.read_metadata):
            with pytest.raises(
                CheckpointError, match="net.safetensors: not a safetensors file: Error"
            ) as caught:
                read(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [coda_fast.load, checkpoints.read_metadata, checkpoints.read_state_dict])
def test_what_is_no_file(read, tmp_path):
    """Reading a pipe would wait for a writer, and a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, what in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(CheckpointError, match=f"{path.name}: expected a file, got {what}"):
            read(path)
    with pytest.raises(CheckpointError, match="expected the name of a file"):
        read("a\0b")
    for path in (tmp_path / "nothing", tmp_path / "nothing" / "there"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            read(path)


def test_a_file_that_may_not_be_read(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    path.chmod(0)
    user = os.geteuid()
    try:
        if not user:  # root may read everything
            os.seteuid(65534)
        for read in (coda_fast.load, checkpoints.read_metadata, checkpoints.read_state_dict):
            with pytest.raises(PermissionError):
                read(path)
    finally:
        os.seteuid(user)


def test_the_command_line_says_it_in_one_line(model, tmp_path, capsys):
    from coda_fast.cli import main

    path = tmp_path / "net.safetensors"
    save_file(
        dict(model.state_dict()),
        path,
        header(model, config=json.dumps(model.config() | {"image_size": 2**70})),
    )
    os.mkfifo(tmp_path / "pipe")
    for checkpoint, message in (
        (path, "image_size: expected a positive int"),
        (tmp_path / "pipe", "expected a file, got a pipe"),
    ):
        for command in (["explain", "x.png"], ["evaluate", "--data", "digits"], ["report", "x.png"]):
            with pytest.raises(SystemExit) as ended:
                main([*command, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "output")])
            error = capsys.readouterr().err
            assert ended.value.code == 2
            assert error.startswith("coda-fast: ")
            assert message in error
            assert error.count("\n") == 1
    assert not (tmp_path / "output").exists()
