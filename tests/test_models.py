"""CoDANet and the named configurations."""

import math

import pytest
import torch

import coda_fast
from coda_fast import CoDANet, create_model

SMALL = dict(out_channels=[4, 3], ranks=[2, 5], kernel_sizes=[3, 1], strides=[2, 1])


def _count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("coda_s_cifar10", {}, 7_782_816),
        ("coda_l_imagenet100", {}, 47_517_408),
        # the paper's rank ablation, in millions: 1.08, 2.03, 3.95, 34.6
        ("coda_s_cifar10", dict(rank=4), 1_076_984),
        ("coda_s_cifar10", dict(rank=8), 2_034_960),
        ("coda_s_cifar10", dict(rank=16), 3_950_912),
        ("coda_s_cifar10", dict(rank=144), 34_606_144),
    ],
)
def test_published_sizes(name, options, parameters):
    assert _count(create_model(name, device="meta", **options)) == parameters


# those of networks with a stem do not name a data set
@pytest.mark.parametrize("name", sorted(set(coda_fast.list_models()) - {"coda_hybrid", "coda_cam"}))
def test_every_model_is_what_its_name_says(name):
    model = create_model(name, device="meta")
    size = model.image_size
    assert coda_fast.list_models()[name] in ("published", "coda_fast")
    classes = {
        "cifar10": 10,
        "imagenet100": 100,
        "imagenette": 10,
        "imagenet1k": 1000,
        "tinyimagenet": 200,
        "digits": 10,
        "mnist": 10,
    }[name.split("_")[-1]]
    assert model.num_classes == classes
    height = size
    for layer in model.layers:
        height, _ = layer.geometry.output_size(height, height)
    assert height >= 4, "the class evidence map should still be a map"


def test_forward_is_the_formula():
    model = CoDANet(**SMALL, temperature=7.0, logit_bias=-1.5)
    images = torch.rand(2, 3, 9, 6)
    x = torch.cat([images, 1 - images], 1)
    for layer in model.layers:
        x = layer(x)
    assert torch.allclose(model(images), x.sum((2, 3)) / 7 - 1.5, rtol=1e-6)
    assert create_model("coda_xs_digits").logit_bias == math.log(0.1 / 0.9)


def test_any_image_size():
    model = create_model("coda_xs_digits")
    for size in ((8, 8), (16, 16), (5, 23)):
        assert model(torch.rand(2, 1, *size)).shape == (2, 10)


def test_overrides():
    model = create_model(
        "coda_xs_digits",
        num_classes=4,
        temperature=3,
        norm="l2",
        class_names=list("abcd"),
        backend="reference",
    )
    assert all(layer.save_contraction == "auto" for layer in model.layers)
    saving = create_model("coda_xs_digits", save_contraction=True)
    assert all(layer.save_contraction is True for layer in saving.layers)
    with pytest.raises(ValueError, match="save_contraction: expected True, False or .auto., got 'x'"):
        create_model("coda_xs_digits", save_contraction="x")
    assert saving.config() == create_model("coda_xs_digits").config(), (
        "the backend is not part of the configuration"
    )
    assert (model.num_classes, model.temperature, model.layers[0].norm, model.layers[0].backend) == (
        4,
        3,
        "l2",
        "reference",
    )
    assert create_model("coda_xs_digits", rank=1).config()["ranks"] == [1, 2, 2]
    assert create_model("coda_xs_digits", ranks=[1, 2, 3]).config()["ranks"] == [1, 2, 3]


def test_config_builds_the_same_network():
    model = CoDANet(
        [4, 3],
        [2, 5],
        [(3, 1), 2],
        [2, (1, 2)],
        ["valid", 1],
        temperature=2.5,
        norm="l2",
        eps=1e-3,
        bias=False,
        image_channels=1,
        image_size=9,
    )
    twin = CoDANet(**model.config())
    assert twin.config() == model.config()
    assert repr(twin) == repr(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ranks=[2]), "ranks: expected 2 entries, as many as out_channels, got 1"),
        (dict(paddings=[1, 1, 1]), "paddings: expected 2 entries"),
        (dict(out_channels=[]), "at least one layer"),
        (dict(temperature=0), "temperature: expected a positive number, got 0"),
        (dict(temperature=math.nan), "temperature"),
        (dict(class_names=["a"]), "class_names: expected 3 names"),
        (dict(logit_bias=math.nan), "logit_bias: expected a finite number"),
        (dict(strides=[1, 0]), "stride"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CoDANet(**(SMALL | dict(temperature=1.0) | options))


def test_default_padding_of_rectangular_kernels():
    model = CoDANet([4, 3], [2, 2], [(3, 1), (1, 5)], [1, 1], temperature=1.0)
    assert [layer.padding for layer in model.layers] == [(1, 0), (0, 2)]


def test_unknown_names():
    with pytest.raises(ValueError, match="model: expected one of coda_s_cifar10, .* got 'resnet50'"):
        create_model("resnet50")
    with pytest.raises(TypeError, match="widths"):
        create_model("coda_xs_digits", widths=3)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        create_model("coda_xs_digits", rank=0)
    with pytest.raises(ValueError, match="rank and ranks"):
        create_model("coda_xs_digits", rank=1, ranks=[1, 1, 1])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(2, 1, 8, 8), ValueError, r"images: expected \[N, 3, H, W\], got shape \[2, 1, 8, 8\]"),
        (torch.rand(3, 8, 8), ValueError, r"images: expected \[N, 3, H, W\]"),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            TypeError,
            "images: expected floating point in .*got torch.uint8",
        ),
        ([[1.0]], TypeError, "images: expected a tensor, got list"),
    ],
    ids=["channels", "unbatched", "uint8", "list"],
)
def test_refuses_images(images, error, message):
    with pytest.raises(error, match=message):
        CoDANet(**SMALL, temperature=1.0)(images)


def test_logits_under_autocast_can_be_told_apart():
    """1000 logits with a bias of -2.2, near which bfloat16 has steps of 1/64, are distinct."""
    torch.manual_seed(0)
    model = coda_fast.create_model("coda_xs_digits", num_classes=1000, temperature=1e4)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.float32
    assert len(logits[0].unique()) > 500
    assert model.to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16


def test_options_of_each_layer():
    """An option is one value for all layers or one for each. ``config`` returns the arguments of the
    constructor.
    """
    config = dict(
        out_channels=[4, 5, 3],
        ranks=[2, 3, 5],
        kernel_sizes=[3, [3, 1], 1],
        strides=[1, 2, 1],
        dilations=[1, [2, 1], 1],
        norm=["squash", "l2", "l2"],
        eps=[1e-6, 1e-3, 1e-6],
        bias=[True, False, True],
    )
    model = CoDANet(**config, temperature=3.0)
    assert [layer.dilation for layer in model.layers] == [(1, 1), (2, 1), (1, 1)]
    # by default, images keep their size
    assert [layer.padding for layer in model.layers] == [(1, 1), (2, 0), (0, 0)]
    assert [layer.norm for layer in model.layers] == config["norm"]
    assert [layer.eps for layer in model.layers] == config["eps"]
    assert [layer.bias is not None for layer in model.layers] == config["bias"]
    found = model.config()
    assert {key: found[key] for key in config} == config
    twin = CoDANet(**found)
    assert repr(twin) == repr(model)
    assert {k: t.shape for k, t in twin.state_dict().items()} == {
        k: t.shape for k, t in model.state_dict().items()
    }
    same = CoDANet(
        **SMALL, temperature=3.0, norm=["l2", "l2"], eps=[1e-3] * 2, bias=[False] * 2, dilations=[1, 1]
    )
    assert same.config() == CoDANet(**SMALL, temperature=3.0, norm="l2", eps=1e-3, bias=False).config()
    assert "dilations" not in same.config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(ranks=[10**12, 5]),
            r"weights of .* numbers: expected what fits into the .* GiB of this machine",
        ),
        (dict(ranks=[2**62, 5]), r"weights: expected less than 2\*\*63 bytes for a layer, got about 2\*\*"),
        (dict(out_channels=[10**200, 3]), r"weights: expected less than 2\*\*63 bytes"),
    ],
    ids=str,
)
def test_what_no_machine_holds_is_refused_before_it_is_allocated(options, message, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(args))
    with pytest.raises(ValueError, match=message):
        CoDANet(**(SMALL | options), temperature=1.0)
    with pytest.raises(ValueError, match=message):
        coda_fast.DAUConv2d(
            6, (options.get("out_channels") or [4])[0], 3, rank=(options.get("ranks") or [2])[0]
        )
    assert not made


def test_the_sum_of_all_layers_counts(monkeypatch):
    """Each layer would fit into memory, but not all together. On the meta device they need no memory."""
    # about 1 GiB each
    layers = dict(out_channels=[64] * 9, ranks=[64] * 9, kernel_sizes=[31] * 9, strides=[1] * 9)
    monkeypatch.setattr("coda_fast.safety.machine_memory", lambda device="cpu": 2 << 30)
    with pytest.raises(
        ValueError, match="weights of .* numbers: expected what fits into the 2 GiB of this machine"
    ):
        CoDANet(**layers, temperature=1.0)
    assert CoDANet(**layers, temperature=1.0, device="meta").num_classes == 64
    with torch.device("meta"):
        assert CoDANet(**layers, temperature=1.0).num_classes == 64
