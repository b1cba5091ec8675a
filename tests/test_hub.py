"""torch.hub and huggingface_hub: entry points and folders, without a network connection."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

import coda_fast
from coda_fast import CheckpointError, CoDANet
from coda_fast.hub import HubCoDANet

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    out_channels=[4, 3],
    ranks=[2, 5],
    kernel_sizes=[3, 1],
    strides=[2, 1],
    temperature=7.0,
    norm="l2",
    class_names=["a", "b", "c"],
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, dtype):
    model = HubCoDANet(**SMALL, dtype=dtype)
    images = torch.rand(2, 3, 9, 9, dtype=dtype)
    model.save_pretrained(tmp_path / "net")
    assert set(os.listdir(tmp_path / "net")) == {"README.md", "config.json", "model.safetensors"}
    twin = HubCoDANet.from_pretrained(tmp_path / "net")
    assert isinstance(twin, PyTorchModelHubMixin)
    assert twin.config() == model.config()
    assert torch.equal(twin(images), model(images))
    assert torch.equal(coda_fast.load(tmp_path / "net" / "model.safetensors")(images), model(images))
    stored = load_file(tmp_path / "net" / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == dict.fromkeys(model.state_dict(), dtype)

    warmer = HubCoDANet.from_pretrained(tmp_path / "net", temperature=3.5)
    assert torch.allclose(
        warmer(images) - model.logit_bias, 2 * (model(images) - model.logit_bias), rtol=1e-3, atol=0.05
    )
    warmer.save_pretrained(tmp_path / "again")
    assert HubCoDANet.from_pretrained(tmp_path / "again").temperature == 3.5


def test_any_network_can_be_wrapped(tmp_path):
    model = coda_fast.create_model("coda_xs_digits").eval()
    wrapped = HubCoDANet.from_model(model)
    assert not wrapped.training
    assert all(a is b for a, b in zip(wrapped.parameters(), model.parameters(), strict=True))
    wrapped.save_pretrained(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    twin = HubCoDANet.from_pretrained(tmp_path)
    assert torch.equal(twin(images), model(images))
    assert twin.explain(images).completeness_error.max() < 1e-4


def test_the_layout_is_that_of_the_mixin(tmp_path):
    """A class that only inherits from the mixin, and uses nothing of coda_fast, reads the folder."""

    class Plain(CoDANet, PyTorchModelHubMixin):
        pass

    model = HubCoDANet(**SMALL)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    assert config == model.config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(Plain.from_pretrained(tmp_path)(images), model(images))


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a config.json with the arguments of CoDANet"):
        HubCoDANet.from_pretrained(tmp_path)
    HubCoDANet(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"layers\.1\.reduction_weight"):
        HubCoDANet.from_pretrained(tmp_path, ranks=[2, 6])
    # the mixin itself would silently load the matching weights only
    with pytest.raises(RuntimeError, match=r"layers\.0\.bias"):
        HubCoDANet.from_pretrained(tmp_path, bias=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        HubCoDANet.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_weights(tmp_path, monkeypatch):
    model = HubCoDANet(**SMALL)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        HubCoDANet(**SMALL).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


HUB = """
import sys, torch
repository = sys.argv[1]
model = torch.hub.load(repository, "coda_s_cifar10", source="local", num_classes=7, rank=4)
import coda_fast
assert coda_fast.__file__.startswith(repository), coda_fast.__file__
assert model.num_classes == 7 and model.layers[0].rank == 4
for name in coda_fast.list_models():
    made = torch.hub.load(repository, name, source="local", device="meta")
    assert made.config() == coda_fast.create_model(name, device="meta").config()
import coda_kernels  # although its folder is no longer on the path
assert coda_kernels.__file__.startswith(repository), coda_kernels.__file__
assert repository not in sys.path and repository + "/kernels" not in sys.path
"""


def test_torch_hub_from_a_folder(tmp_path):
    """In a process that cannot import this source tree otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", HUB, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_without_huggingface_hub():
    code = "import sys; sys.modules['huggingface_hub'] = None; import coda_fast; import coda_fast.hub"
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "ImportError: coda_fast.hub needs huggingface_hub: pip install 'coda-fast[hub]'" in done.stderr


def test_what_a_folder_cannot_say_is_refused(tmp_path):
    """Networks that ``save`` refuses are refused here too. A wrapper changes nothing. A dtype must be a
    floating-point dtype.
    """
    model = coda_fast.create_model("coda_xs_digits")
    twin = HubCoDANet.from_model(torch.nn.DataParallel(model))
    assert twin.layers[0].weight is model.layers[0].weight
    model.layers[1] = coda_fast.DAUConv2d(8, 16, 3, stride=2, padding=2, dilation=2, rank=32)
    HubCoDANet.from_model(model).save_pretrained(tmp_path / "dilated")
    images = torch.rand(1, 1, 8, 8)
    assert torch.equal(HubCoDANet.from_pretrained(tmp_path / "dilated")(images), model(images))
    model.layers[1].register_buffer("mean", torch.zeros(1))
    with pytest.raises(ValueError, match=r"layers.1: .*has \['mean'\] besides"):
        HubCoDANet.from_model(model)
    for dtype in ("load", "no", 3):
        with pytest.raises(ValueError, match="dtype: expected a floating-point dtype"):
            HubCoDANet(**coda_fast.create_model("coda_xs_digits").config(), dtype=dtype)
