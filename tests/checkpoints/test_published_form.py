"""State dicts in the form of the published networks, and pickled files, of which only tensors are read."""

import os
import pickle
import zipfile

import pytest
import torch
from support import Golden
from support_checkpoints import middle_layer, three_layer_network

from coda_fast import CheckpointError, CoDANet, checkpoints

OPTIONS = dict(strides=[1, 2, 1, 1], paddings=[1, 1, 1, 0], temperature=20, logit_bias=-2.2)


def published_state():
    """The state dict of a small network in the published form, in float64."""
    golden = Golden("net_small")
    return {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}


A1, BIAS1 = "1.weight_mod.weighting_f.1.weight", "1.weight_mod.weighting_f.1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"fc.weight": torch.zeros(1)}, "unknown key 'fc.weight'"),
        (lambda s: {k: v for k, v in s.items() if k != A1}, f"missing key '{A1}'"),
        (
            lambda s: s | {A1: s[A1][:, :3]},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[576, 3, 1, 1\]",
        ),
        (
            lambda s: s | {A1: s[A1][:100]},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[100, 8, 1, 1\]",
        ),
        (
            lambda s: s | {BIAS1: torch.zeros(5, dtype=torch.float64)},
            rf"'{BIAS1}': expected \[576\], got \[5\]",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("1.")}, "no keys for layer 1"),
        (lambda s: s | {"module." + A1: s[A1]}, r"keys with different prefixes \['', 'module.'\]"),
        (lambda s: {}, "no layers"),
        (
            lambda s: s | {A1: torch.tensor(1.0, dtype=torch.float64)},
            rf"'{A1}': expected \[72 \* units, 8, 1, 1\], got \[\]",
        ),
        (lambda s: s | {A1: None}, f"'{A1}': expected a floating-point tensor .* got NoneType"),
        (lambda s: s | {A1: s[A1].long()}, f"'{A1}': expected a floating-point tensor .* got torch.int64"),
        (lambda s: s | {A1: s[A1].float()}, "tensors of different dtypes"),
        (lambda s: {k: v for k, v in s.items() if k != BIAS1}, f"missing key '{BIAS1}'"),
        (lambda s: s | {"01." + A1[2:]: s[A1]}, "a second tensor for layer 1"),
        (lambda s: {("9" * 9 + k[1:]) if k[0] == "1" else k: v for k, v in s.items()}, "no keys for layer 1"),
        (lambda s: s | {"9" * 5000 + A1[1:]: s[A1]}, "unknown key '9999"),
        (lambda s: s | {f"x{i}": s[A1] for i in range(10**5)}, "unknown key 'x9'; and 99990 more"),
        (lambda s: s | {A1: s[A1].to_sparse()}, f"'{A1}': expected a floating-point tensor"),
        (
            lambda s: s | {A1: torch.zeros(1, dtype=torch.float64).expand(72 * 10**12, 8, 1, 1)},
            "weights: expected what fits into the",
        ),
        (lambda s: list(s.items()), "state dict: expected names to tensors, got list"),
    ],
)
def test_from_published_names_the_problem(change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.from_published(change(published_state()), **OPTIONS)


def test_from_published_names_all_problems():
    state = published_state()
    del state[A1]
    state["x"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.from_published(state, **OPTIONS)
    assert "unknown key 'x'" in str(caught.value)
    assert f"missing key '{A1}'" in str(caught.value)


def test_from_published_checks_geometry():
    with pytest.raises(
        CheckpointError, match="strides: expected 4 entries, one for each layer of the state dict, got 2"
    ):
        checkpoints.from_published(published_state(), **(OPTIONS | dict(strides=[1, 1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strides=3), "strides: expected 4 entries, one for each layer of the state dict, got 3"),
        (dict(strides=[1, 1, 1, 2**70]), r"does not give a network: strides\[3\]: expected at most 65536"),
        (dict(paddings=[1, 1, 1, "x"]), "does not give a network: padding: expected"),
        (dict(temperature=float("nan")), "does not give a network: temperature: expected a finite number"),
        (dict(norm="l3"), "does not give a network: norm: expected one of"),
    ],
    ids=str,
)
def test_from_published_refuses_options(options, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.from_published(published_state(), **(OPTIONS | options))


def test_published_form_has_no_place_for_some_options():
    for layer, message in (
        (
            dict(dilation=2),
            r"dilations: the published form has none of its own for each layer, got \[1, 2, 1\]",
        ),
        (
            dict(bias=False),
            r"bias: the published form has none of its own for each layer, got \[True, False, True\]",
        ),
    ):
        net = three_layer_network()
        net.layers[1] = middle_layer(**layer)
        with pytest.raises(ValueError, match=message):
            checkpoints.to_published(net)
    net = three_layer_network()
    net.layers[1] = middle_layer(norm="l2", eps=0.5)
    options = dict(strides=[1] * 3, paddings=[1, 1, 0], temperature=2.0, logit_bias=net.logit_bias)
    twin = checkpoints.from_published(
        checkpoints.to_published(net), norm=["squash", "l2", "squash"], eps=[1e-6, 0.5, 1e-6], **options
    )
    images = torch.rand(1, 3, 9, 9)
    assert torch.equal(twin(images), net(images))


def test_published_round_trip_without_bias():
    model = CoDANet([4, 3], [2, 5], [3, 1], [2, 1], temperature=7.0, bias=False)
    state = checkpoints.to_published(model)
    assert len(state) == 4
    twin = checkpoints.from_published(
        state, strides=[2, 1], paddings=[1, 0], temperature=7.0, logit_bias=model.logit_bias
    )
    assert twin.config() == model.config()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_ten_layers_come_in_numerical_order():
    model = CoDANet([2] * 11, [1] * 11, [1] * 11, [1] * 11, temperature=1.0)
    state = checkpoints.to_published(model)
    shuffled = dict(sorted(state.items()))  # '10.' sorts before '2.'
    twin = checkpoints.from_published(
        shuffled, strides=[1] * 11, paddings=[0] * 11, temperature=1.0, logit_bias=0.0
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class MakesAFolder:
    """Unpickling this creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pkl"
    state = published_state()
    torch.save(state, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in checkpoints.read_state_dict(path).items())
    torch.save({"state": MakesAFolder()}, path)
    with pytest.raises(CheckpointError, match="tensors only"):
        checkpoints.read_state_dict(path)
    path.write_bytes(pickle.dumps(MakesAFolder()))
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


def test_a_packed_file_is_not_unpacked_beyond_memory(tmp_path, monkeypatch):
    path = tmp_path / "net.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    assert path.stat().st_size < 10**5
    monkeypatch.setattr("coda_fast.safety.machine_memory", lambda device="cpu": 10**6)
    with pytest.raises(CheckpointError, match="tensors: expected what fits into the .* of this machine"):
        checkpoints.read_state_dict(path)
