"""Files: whole or not at all, nothing unpickled, every problem named."""

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file
from support import Golden

import coda_fast
from coda_fast import CheckpointError, CoDANet, checkpoints, create_model


@pytest.fixture
def model():
    return CoDANet([4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, norm="l2", class_names=["a", "b", "c"], image_size=9)


def test_round_trip(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path, {"accuracy": 0.5})
    twin = coda_fast.load(path)
    assert twin.config() == model.config()
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(twin(images), model(images))
    assert checkpoints.read_metadata(path) == {"accuracy": 0.5}
    assert coda_fast.load(path, temperature=1.0, backend="reference").temperature == 1.0
    assert os.listdir(tmp_path) == ["net.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(tmp_path, dtype):
    model = create_model("coda_xs_digits", dtype=dtype)
    coda_fast.save(model, tmp_path / "net.safetensors")
    assert next(coda_fast.load(tmp_path / "net.safetensors").parameters()).dtype == dtype


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        coda_fast.save(create_model("coda_xs_digits"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


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
    header = {"format": "coda_fast.CoDANet", "config": json.dumps(model.config()), "metadata": "{}"}
    save_file(tensors, path, header)
    with pytest.raises(
        CheckpointError, match=r"unknown key 'extra'; missing key 'layers.1.bias'; 'layers.0.weight': expected .* got \[1, 2, 3\]"
    ):
        coda_fast.load(path)


def _header(model, **changes):
    return {"format": "coda_fast.CoDANet", "config": json.dumps(model.config()), "metadata": "{}"} | changes


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
    ],
    ids=str,
)
def test_bad_configurations(model, tmp_path, config, message):
    path = tmp_path / "net.safetensors"
    header = _header(model)
    if isinstance(config, dict):
        header["config"] = json.dumps(model.config() | config)
    elif config is None:
        del header["config"]
    else:
        header["config"] = config
    save_file(dict(model.state_dict()), path, header)
    with pytest.raises(CheckpointError, match=message) as caught:
        coda_fast.load(path)
    assert "net.safetensors: " in str(caught.value)


def test_bad_tensors(model, tmp_path):
    path = tmp_path / "net.safetensors"
    for tensors in (
        {k: v.to(torch.int8) for k, v in model.state_dict().items()},
        {**model.state_dict(), "layers.0.bias": torch.zeros(1).double()},
    ):
        save_file(tensors, path, _header(model))
        with pytest.raises(CheckpointError, match="expected tensors of one dtype"):
            coda_fast.load(path)
    with pytest.raises(CheckpointError, match="expected a file, got a folder"):
        coda_fast.load(tmp_path)


# -- the published format ---------------------------------------------------------------------------------------------------------------

OPTIONS = dict(strides=[1, 2, 1, 1], paddings=[1, 1, 1, 0], temperature=20, logit_bias=-2.2)


def _state():
    golden = Golden("net_small")
    return {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}


A1, BIAS1 = "1.weight_mod.weighting_f.1.weight", "1.weight_mod.weighting_f.1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"fc.weight": torch.zeros(1)}, "unknown key 'fc.weight'"),
        (lambda s: {k: v for k, v in s.items() if k != A1}, f"missing key '{A1}'"),
        (lambda s: s | {A1: s[A1][:, :3]}, rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[576, 3, 1, 1\]"),
        (lambda s: s | {A1: s[A1][:100]}, rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[100, 8, 1, 1\]"),
        (lambda s: s | {BIAS1: torch.zeros(5, dtype=torch.float64)}, rf"'{BIAS1}': expected \[576\], got \[5\]"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("1.")}, "no keys for layer 1"),
        (lambda s: s | {"module." + A1: s[A1]}, r"keys with different prefixes \['', 'module.'\]"),
        (lambda s: {}, "no layers"),
        (lambda s: s | {A1: torch.tensor(1.0, dtype=torch.float64)}, rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[\]"),
        (lambda s: s | {A1: None}, f"'{A1}': expected a floating-point tensor .* got NoneType"),
        (lambda s: s | {A1: s[A1].long()}, f"'{A1}': expected a floating-point tensor .* got torch.int64"),
        (lambda s: s | {A1: s[A1].float()}, "tensors of different dtypes"),
        (lambda s: {k: v for k, v in s.items() if k != BIAS1}, f"missing key '{BIAS1}'"),
        (lambda s: s | {"01." + A1[2:]: s[A1]}, "a second tensor for layer 1"),
    ],
)
def test_from_published_names_the_problem(change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.from_published(change(_state()), **OPTIONS)


def test_from_published_names_all_problems():
    state = _state()
    del state[A1]
    state["x"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.from_published(state, **OPTIONS)
    assert "unknown key 'x'" in str(caught.value)
    assert f"missing key '{A1}'" in str(caught.value)


def test_from_published_checks_geometry():
    with pytest.raises(CheckpointError, match="strides: expected 4 entries, one for each layer of the state dict, got 2"):
        checkpoints.from_published(_state(), **(OPTIONS | dict(strides=[1, 1])))


def test_published_round_trip_without_bias():
    model = CoDANet([4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, bias=False)
    state = checkpoints.to_published(model)
    assert len(state) == 4
    twin = checkpoints.from_published(state, strides=[2, 1], paddings=[1, 0], temperature=7.0, logit_bias=model.logit_bias)
    assert twin.config() == model.config()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_ten_layers_come_in_numerical_order():
    model = CoDANet([2] * 11, [1] * 11, [1] * 11, [1] * 11, temperature=1.0)
    state = checkpoints.to_published(model)
    shuffled = dict(sorted(state.items()))  # '10.' sorts before '2.'
    twin = checkpoints.from_published(shuffled, strides=[1] * 11, paddings=[0] * 11, temperature=1.0, logit_bias=0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pkl"
    state = _state()
    torch.save(state, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in checkpoints.read_state_dict(path).items())
    torch.save({"state": _Evil()}, path)
    with pytest.raises(CheckpointError, match="tensors only"):
        checkpoints.read_state_dict(path)
    path.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="net.pkl"):
        checkpoints.read_state_dict(path)
    assert not (tmp_path / "evil-was-here").exists()
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="expected a state dict"):
        checkpoints.read_state_dict(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.read_state_dict(tmp_path / "missing.pkl")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="net.pkl"):
        checkpoints.read_state_dict(path)
