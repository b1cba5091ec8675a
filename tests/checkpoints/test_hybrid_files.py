"""Files of hybrid networks: the weights of the stem or their checksum, other dtypes and classes, weights from
other files, and files that are damaged or hostile.
"""

import contextlib
import copy
import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import coda_fast
from coda_fast import CheckpointError, HybridCoDANet, pretrained, stems
from coda_fast.hybrid import CAMNet

STEM = dict(stem="convolutions", at=1, stem_options={"widths": [4, 6], "strides": [1, 2]})
LAYERS = dict(out_channels=[6, 5], ranks=[3, 4], kernel_sizes=[3, 1], strides=[1, 1], temperature=5.0)
SWIN = dict(
    stem="swin_tiny_patch4_window7_224",
    at=1,
    stem_options={"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4]},
)


def hybrid(seed=1, **options):
    torch.manual_seed(seed)
    return HybridCoDANet(**(STEM | LAYERS | options)).eval()


def trained(seed=1, **options):
    """A network whose batch normalisation has counted a batch."""
    model = hybrid(seed, frozen=False, **options).train()
    model(torch.rand(4, 3, 8, 8, dtype=model.layers[0].weight.dtype))
    return model.eval()


@pytest.fixture
def offline(monkeypatch):
    """No connection is tried, and none would be there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def same(a, b, images):
    with torch.no_grad():
        return torch.equal(a(images), b(images))


# -- whole files
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [HybridCoDANet, CAMNet])
def test_round_trip(tmp_path, dtype, kind):
    """Weights and statistics of the stem come back bit for bit, counters as integers."""
    model = trained()
    if kind is CAMNet:
        model = CAMNet(**STEM, num_classes=5, temperature=2.0, frozen=True).eval()
    model, images = model.to(dtype), torch.rand(2, 3, 8, 8, dtype=dtype)
    coda_fast.save(model, tmp_path / "net", {"accuracy": 0.5})
    again = coda_fast.load(tmp_path / "net").eval()
    assert type(again) is kind
    assert again.config() == model.config()
    assert again.stem.frozen == model.stem.frozen
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for name, tensor in model.state_dict().items():
        other = again.state_dict()[name]
        assert other.dtype == tensor.dtype == (torch.int64 if "num_batches" in name else dtype)
        assert torch.equal(other, tensor), name
    assert same(again, model, images)
    assert again.stem.placement(8, 8) == model.stem.placement(8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_loading_in_another_dtype(tmp_path, dtype):
    model = trained()
    coda_fast.save(model, tmp_path / "net")
    again = coda_fast.load(tmp_path / "net", dtype=dtype).eval()
    expected = copy.deepcopy(model).to(dtype)
    assert same(again, expected, torch.rand(2, 3, 8, 8, dtype=dtype))
    counters = [t for name, t in again.state_dict().items() if "num_batches" in name]
    assert [(int(t), t.dtype) for t in counters] == [(1, torch.int64)] * 4


def test_another_number_of_classes(tmp_path):
    model, images = trained(class_names=list("abcde")), torch.rand(2, 3, 8, 8)
    coda_fast.save(model, tmp_path / "net")
    again = coda_fast.load(tmp_path / "net", num_classes=3).eval()
    assert (again.num_classes, again.class_names) == (3, None)
    assert torch.equal(again.stem(images), model.stem(images))
    assert torch.equal(again.layers[0].weight, model.layers[0].weight)
    network = CAMNet(**STEM, num_classes=5, temperature=2.0).eval()
    coda_fast.save(network, tmp_path / "cam")
    again = coda_fast.load(tmp_path / "cam", num_classes=7).eval()
    assert again(images).shape == (2, 7)
    assert torch.equal(again.stem(images), network.stem(images))


def test_meta(tmp_path):
    coda_fast.save(hybrid(), tmp_path / "net")
    coda_fast.save(hybrid(), tmp_path / "small", stem="checksum")
    for name in ("net", "small"):
        model = coda_fast.load(tmp_path / name, device="meta")
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_normalisation_and_image_size_are_stored(tmp_path):
    model = hybrid(mean=[0.1, 0.2, 0.3], std=0.25, image_size=16, class_names=list("abcde"))
    coda_fast.save(model, tmp_path / "net")
    again = coda_fast.load(tmp_path / "net").eval()
    assert again.stem.config()["mean"] == [0.1, 0.2, 0.3]
    assert again.stem.config()["std"] == [0.25] * 3
    assert (again.image_size, again.transform.crop) == (16, 16)
    assert same(again, model, torch.rand(1, 3, 8, 8))


@pytest.fixture(scope="module")
def swin():
    return hybrid(**SWIN)


def test_buffers_that_are_not_stored(tmp_path, swin):
    """Tables that are no part of the state dict, such as those of a Swin transformer, are made again."""
    own = swin.state_dict()
    assert [name for name, _ in swin.named_buffers() if name not in own]
    coda_fast.save(swin, tmp_path / "net")
    again, images = coda_fast.load(tmp_path / "net").eval(), torch.rand(1, 3, 224, 224)
    assert same(again, swin, images)
    assert again.explain(images).completeness_error.max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_buffers_that_are_not_stored_in_another_dtype(tmp_path, swin, dtype):
    model, images = copy.deepcopy(swin).to(dtype), torch.rand(1, 3, 224, 224, dtype=dtype)
    coda_fast.save(model, tmp_path / "net")
    assert same(coda_fast.load(tmp_path / "net").eval(), model, images)
    coda_fast.save(swin, tmp_path / "net")
    assert same(coda_fast.load(tmp_path / "net", dtype=dtype).eval(), model, images)


def test_loading_draws_no_numbers(tmp_path, swin):
    coda_fast.save(swin, tmp_path / "net")
    state = torch.get_rng_state()
    coda_fast.load(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_without_a_name(tmp_path):
    model = HybridCoDANet(nn.Conv2d(3, 4, 3), **LAYERS)
    with pytest.raises(ValueError, match="^stem: expected a stem with a name.*register_stem$"):
        coda_fast.save(model, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_registered_stem(tmp_path, monkeypatch):
    monkeypatch.setattr(stems, "_STEMS", dict(stems._STEMS))
    coda_fast.register_stem(
        "tanh", lambda channels, width=4: nn.Sequential(nn.Conv2d(channels, width, 3), nn.Tanh())
    )
    model = hybrid(stem="tanh", stem_options={"width": 6})
    coda_fast.save(model, tmp_path / "net")
    assert same(coda_fast.load(tmp_path / "net").eval(), model, torch.rand(1, 3, 8, 8))
    del stems._STEMS["tanh"]
    with pytest.raises(CheckpointError, match="expected a model of timm or a registered stem .*got 'tanh'"):
        coda_fast.load(tmp_path / "net")


@pytest.mark.parametrize("change", ["frozen", "layer", "mode"])
def test_stems_that_no_configuration_describes(tmp_path, change):
    model = hybrid()
    if change == "layer":
        model.stem.network[0][2] = nn.GELU()
    if change == "frozen":
        model.stem.network[0][1].eps = 0.1
    if change == "mode":
        model.stem.network[1][0].register_buffer("more", torch.zeros(2))
    with pytest.raises(ValueError, match="encoder.stem.network"):
        coda_fast.save(model, tmp_path / "net")


@pytest.mark.parametrize("name", pretrained.names())
def test_weights_of_the_package_are_still_read(name):
    path = pretrained.FOLDER / f"{name}.safetensors"
    model = coda_fast.load(path)
    stored = load_file(path)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    assert (model.stem_name, type(model)) == (None, coda_fast.CoDANet)


# -- weights of stems from other files
# ------------------------------------------------------------------------------------------------------------


def test_a_checksum_in_place_of_the_stem(tmp_path):
    model, images = trained(), torch.rand(2, 3, 8, 8)
    coda_fast.save(model, tmp_path / "whole")
    coda_fast.save(model, tmp_path / "small", stem="checksum")
    names = load_file(tmp_path / "small").keys()
    assert not [name for name in names if name.startswith("encoder.stem.network.")]
    assert len(names) > 4
    assert os.path.getsize(tmp_path / "small") < os.path.getsize(tmp_path / "whole")
    again = coda_fast.load(tmp_path / "small", stem_weights=tmp_path / "whole").eval()
    assert same(again, model, images)
    double = coda_fast.load(tmp_path / "small", stem_weights=tmp_path / "whole", dtype=torch.float64).eval()
    assert same(double, copy.deepcopy(model).double(), images.double())
    three = coda_fast.load(tmp_path / "small", stem_weights=tmp_path / "whole", num_classes=3).eval()
    assert torch.equal(three.stem(images), model.stem(images))
    assert three(images).shape == (2, 3)


def test_other_weights_than_those_of_the_checksum(tmp_path):
    coda_fast.save(hybrid(), tmp_path / "small", stem="checksum")
    coda_fast.save(hybrid(2), tmp_path / "other")
    with pytest.raises(
        CheckpointError, match="stem_weights: expected weights of convolutions with SHA-256"
    ) as e:
        coda_fast.load(tmp_path / "small", stem_weights=tmp_path / "other")
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="small: .*stem_weights: expected a file"):
        coda_fast.load(tmp_path / "small")
    with pytest.raises(ValueError, match="^stem_weights: expected none, because .*other holds all weights"):
        coda_fast.load(tmp_path / "other", stem_weights=tmp_path / "other")
    with pytest.raises(ValueError, match="^stem: expected 'weights' or 'checksum', got 'none'"):
        coda_fast.save(hybrid(), tmp_path / "x", stem="none")
    with pytest.raises(ValueError, match="^stem: expected 'weights' for a network without a stem"):
        coda_fast.save(coda_fast.create_model("coda_xs_digits"), tmp_path / "x", stem="checksum")


def test_a_checksum_without_a_network_connection(tmp_path, offline):
    model = hybrid(stem="resnet18.a1_in1k", stem_options=None, stem_weights=None)
    coda_fast.save(model, tmp_path / "small", stem="checksum")
    with pytest.raises(CheckpointError, match=r"small: stem_weights: .*resnet18\.a1_in1k"):
        coda_fast.load(tmp_path / "small")


def test_the_stem_of_a_network_that_was_cut_later(tmp_path):
    network = CAMNet("convolutions", stem_options=STEM["stem_options"], num_classes=3, temperature=2.0).eval()
    coda_fast.save(network, tmp_path / "cam")
    images = torch.rand(1, 3, 8, 8)
    model = hybrid(at=0, stem_weights=tmp_path / "cam")
    assert torch.equal(model.stem(images), network.stem.network[0](images))
    coda_fast.save(model, tmp_path / "early")
    with pytest.raises(
        CheckpointError, match="expected the weights of a stem 'convolutions' cut at 1, found no"
    ):
        hybrid(at=1, stem_weights=tmp_path / "early")
    with pytest.raises(CheckpointError, match=r"0.0.weight: expected \[8, 3, 3, 3\], got \[4, 3, 3, 3\]"):
        hybrid(at=0, stem_options={"widths": [8, 6], "strides": [1, 2]}, stem_weights=tmp_path / "cam")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"])
def test_weights_of_a_whole_timm_model(tmp_path, name):
    """A file with the state dict of the timm model, as its authors publish it."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=2)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "timm.safetensors")
    stem = stems.Stem(name, 0, weights=tmp_path / "timm.safetensors")
    stored = [t.flatten() for t in model.state_dict().values()]
    for tensor in stem.network.parameters():
        assert any(t.shape == (tensor.numel(),) and torch.equal(t, tensor.flatten()) for t in stored)


# -- damaged and hostile files
# ------------------------------------------------------------------------------------------------------------


def written(path, model=None, config=None, tensors=None):
    """The file of a network, with changes to its configuration and its tensors."""
    coda_fast.save(hybrid() if model is None else model, path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    header["config"] = json.dumps(json.loads(header["config"]) | (config or {}))
    save_file({k: t for k, t in (load_file(path) | (tensors or {})).items() if t is not None}, path, header)
    return path


def refused(path, message=": ", **options):
    with pytest.raises(CheckpointError, match=message) as error:
        coda_fast.load(path, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stem": "hf-hub:x/y"}, "stem: expected a model of timm or a registered stem .*'hf-hub:x/y'"),
        ({"stem": "hf-hub:timm/resnet18.a1_in1k"}, "stem: expected a model of timm or a registered stem"),
        ({"stem": "local-dir:/tmp"}, "stem: expected a model of timm or a registered stem"),
        ({"stem": "resnet18.nothing"}, "stem: expected weights of resnet18 that timm has"),
        ({"stem": 3}, "stem: expected the name of a network or a module, got int"),
        ({"stem": None}, "unknown key 'encoder.stem.mean'"),
        ({"stem_options": {"checkpoint_path": "/etc/passwd"}}, "stem_options: .*got 'checkpoint_path'"),
        ({"stem_options": {"pretrained": True}}, "stem_options: .*got 'pretrained'"),
        ({"stem_options": {"pretrained_cfg": {"url": "x"}}}, "stem_options: .*got 'pretrained_cfg'"),
        ({"stem_options": {"widths": [10**9]}}, "stem_options: widths: expected a number up to"),
        ({"stem_options": {"widths": 10**400}}, "stem_options: widths: expected a number up to"),
        ({"stem_options": {"widths": [4] * 10**5}}, "stem_options: widths: .*at most 64 of these"),
        ({"stem_options": {"widths": [1 << 13] * 2, "strides": [1, 1]}}, "expected .8192, 3, 3, 3., got"),
        ({"stem_options": [1]}, "the configuration does not give a network"),
        ({"at": 10**400}, "at: expected a stage, 0 to 1 or one of 0, 1, got about"),
        ({"at": [0]}, "at: expected a stage"),
        ({"at": 0}, "unknown key 'encoder.stem.network.1"),
        ({"frozen": "no"}, "frozen: expected True or False, got 'no'"),
        ({"mean": [1e400] * 3}, "mean: expected a finite number"),
        ({"std": [1, 1, 0]}, "std: expected 3 numbers above 0"),
        ({"std": [1.0] * 10**4}, "std: expected 3 numbers above 0"),
        ({"mean": "0"}, "mean: expected a number"),
        ({"encoder": None}, "unknown entries .'encoder'. in the stored configuration"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_configurations(tmp_path, config, message):
    refused(written(tmp_path / "net", config=config), message)


@pytest.mark.parametrize(
    "config",
    [
        {"stem": "vit_tiny_patch16_224", "stem_options": {"patch_size": 0}},
        {"stem": "vit_tiny_patch16_224", "stem_options": {"img_size": []}},
        {"stem": "resnet18", "stem_options": {"layers": []}},
        {"stem_weights": "/nothing"},
        {"stem_weights": 1 << 20},  # the number of an open file, if there were one
    ],
    ids=str,
)
def test_hostile_configurations_whose_errors_escape(tmp_path, config):
    refused(written(tmp_path / "net", config=config))


@pytest.mark.parametrize("weights", ["pretrained", "auto"])
def test_a_file_does_not_make_anything_be_fetched(tmp_path, monkeypatch, weights):
    model = hybrid(stem="resnet18.a1_in1k", at=0, stem_options=None, stem_weights=None)
    path = written(tmp_path / "net", model, config={"stem_weights": weights})
    fetched, plain = [], timm.create_model

    def create(name, pretrained=False, **options):
        fetched.extend([name] * bool(pretrained))
        return plain(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with contextlib.suppress(CheckpointError):
        coda_fast.load(path, num_classes=7)
    assert not fetched


def test_options_do_not_choose_the_device(tmp_path):
    options = {"stem": "vit_tiny_patch16_224", "stem_options": {"device": "cpu"}}
    path = written(tmp_path / "net", config=options)
    refused(path, "stem_options: expected arguments that describe layers, got 'device'")


def test_options_that_ask_for_many_layers(tmp_path, monkeypatch):
    """A file with few tensors does not make thousands of layers, which would take minutes."""
    made, plain = [], nn.Linear.__init__

    def counting(self, *arguments, **options):
        made.append(1)
        if len(made) > 400:
            raise KeyboardInterrupt  # which nothing catches
        plain(self, *arguments, **options)

    monkeypatch.setattr(nn.Linear, "__init__", counting)
    config = {"stem": "vit_tiny_patch16_224", "at": 0, "stem_options": {"depth": 1 << 14}}
    path = written(tmp_path / "net", config=config)
    try:
        refused(path)
    except KeyboardInterrupt:
        pytest.fail("more than 400 layers are made")


PART = "encoder.stem.network.0.1."


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({PART + "running_mean": None}, f"missing key '{PART}running_mean'"),
        ({PART + "num_batches_tracked": None}, f"missing key '{PART}num_batches_tracked'"),
        ({"encoder.stem.mean": None}, "missing key 'encoder.stem.mean'"),
        ({PART + "more": torch.zeros(2)}, f"unknown key '{PART}more'"),
        ({PART + "weight": torch.zeros(5)}, rf"'{PART}weight': expected \[4\], got \[5\]"),
        ({PART + "weight": torch.zeros(4).half()}, "expected tensors of one dtype"),
        ({PART + "weight": torch.zeros(4, dtype=torch.int32)}, "expected tensors of one dtype"),
    ],
    ids=str,
)
def test_damaged_tensors(tmp_path, tensors, message):
    refused(written(tmp_path / "net", tensors=tensors), message)


@pytest.mark.parametrize(
    "name", ["layers.0.weight", PART + "weight", PART + "running_mean", "encoder.stem.mean"]
)
def test_integers_in_place_of_weights(tmp_path, name):
    tensor = hybrid().state_dict()[name]
    refused(written(tmp_path / "net", tensors={name: tensor.long()}), name)


def test_integers_in_place_of_weights_without_a_stem(tmp_path):
    model = coda_fast.create_model("coda_xs_digits")
    tensors = {"layers.0.weight": model.layers[0].weight.detach().long()}
    refused(written(tmp_path / "net", model, tensors=tensors), "layers.0.weight")


def test_numbers_in_place_of_counters(tmp_path):
    name = PART + "num_batches_tracked"
    refused(written(tmp_path / "net", tensors={name: torch.tensor(0.5)}), name)


def test_a_damaged_checksum(tmp_path):
    coda_fast.save(hybrid(), tmp_path / "whole")
    coda_fast.save(hybrid(), tmp_path / "small", stem="checksum")
    with safe_open(tmp_path / "small", "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(tmp_path / "small")
    save_file(tensors, tmp_path / "net", header | {"stem_sha256": "x" * 10**5})
    refused(
        tmp_path / "net", "expected weights of convolutions with SHA-256 xxx", stem_weights=tmp_path / "whole"
    )
    save_file(tensors, tmp_path / "net", {k: v for k, v in header.items() if k != "stem_sha256"})
    refused(tmp_path / "net", "missing key 'encoder.stem.network")
