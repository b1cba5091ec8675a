"""Hybrid networks: their explanations compared with the definition, placed on the image, saved and drawn; and
the tools for other networks on them: timm, huggingface_hub, export, baselines and evaluation.
"""

import copy
import json
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import coda_fast
from coda_fast import (
    CoDAHead,
    CoDANet,
    Explanation,
    HybridCoDANet,
    baselines,
    evaluation,
    registry,
    timm_models,
)
from coda_fast.hybrid import CAMNet
from coda_fast.losses import matrix_penalty
from coda_fast.placement import Placement

STEM = dict(stem="convolutions", at=1, stem_options={"widths": [4, 6], "strides": [1, 2]})
LAYERS = dict(
    out_channels=[6, 7, 5], ranks=[3, 4, 4], kernel_sizes=[3, 3, 1], strides=[1, 2, 1], temperature=5.0
)
TARGET = [[0, 1], [4, 2], [3, 3]]


class Signed(nn.Module):
    """A stem whose features have both signs."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(5)
        nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), norm, nn.ReLU(), nn.Conv2d(5, 4, 3, 1, 1))

    def forward(self, images):
        return self.layers(images)


def hybrid(dtype=torch.float32, stem=None, **options):
    torch.manual_seed(1)
    chosen = STEM if stem is None else dict(stem=stem)
    return HybridCoDANet(**(chosen | LAYERS | options), dtype=dtype).eval()


def cam(dtype=torch.float32, **options):
    torch.manual_seed(1)
    return CAMNet(**(STEM | dict(num_classes=5, temperature=16.0) | options), dtype=dtype).eval()


# -- explanations, compared with the definition
# ------------------------------------------------------------------------------------------------------------


def applied_weights(layer, input, applied):
    """The output of a layer by its definition: patches of ``applied`` times the weights that ``input``
    generates, scaled by the norm "squash".
    """
    g = layer.geometry
    windows = dict(kernel_size=g.kernel, dilation=g.dilation, stride=g.stride)
    patches, others = (F.unfold(F.pad(t, g.padding), **windows) for t in (input, applied))
    z = layer.reduction_weight.flatten(1) @ patches
    w = torch.einsum("ord,nrp->nodp", layer.weight.flatten(2), z) + layer.bias.flatten(1)[None, :, :, None]
    square = w.square().sum(2, keepdim=True)
    w = w * square.sqrt() / (1 + square)
    return (w * others[:, None]).sum(2).view(len(input), -1, *g.output_size(*input.shape[2:]))


def rows_of_the_map(model, images, target, first):
    """(activations at the input of layer ``first``, the rows [N, K, C, h, w] of the linear map from there to
    the logits), by automatic differentiation of the definition with the weights held.
    """
    with torch.no_grad():
        shape = (1, -1, 1, 1)
        features = model.stem.network((images - model.stem.mean.view(shape)) / model.stem.std.view(shape))
        halves = (F.relu(features), F.relu(-features)) if model.signed else (features,)
        activations = [torch.cat(halves, 1)]
        for layer in model.layers:
            activations.append(applied_weights(layer, activations[-1], activations[-1]))

    def evidence(applied):
        for layer, entering in zip(model.layers[first:], activations[first:-1], strict=True):
            applied = applied_weights(layer, entering, applied)
        return applied.sum((2, 3)) / model.temperature

    rows = torch.func.jacrev(evidence)(activations[first])  # [N, classes, N, C, h, w]
    chosen = [torch.stack([rows[n, c, n] for c in classes]) for n, classes in enumerate(target)]
    return activations[first], torch.stack(chosen).detach()


@pytest.mark.parametrize("stem", [Signed(), None], ids=["signed", "convolutions"])
@pytest.mark.parametrize("layer", [None, 1, -1])
def test_explanations_are_as_defined(stem, layer):
    model = hybrid(torch.float64, copy.deepcopy(stem), mean=[0.2, 0.4, 0.5], std=[0.5, 1.0, 2.0])
    images, first = torch.rand(3, 3, 13, 10, dtype=torch.float64), 0 if layer is None else layer % 3
    entering, rows = rows_of_the_map(model, images, TARGET, first)
    e = model.explain(images, TARGET, layer=layer)
    assert e.layer == first
    torch.testing.assert_close(e.dynamic_weight, rows, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(e.contributions, rows * entering[:, None], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(e.contribution_map, e.contributions.sum(2), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("make", [hybrid, cam])
def test_contributions_add_up(make, dtype, bound):
    """All sums are the logit less the bias, up to rounding relative to the sum of absolute contributions."""
    model, images = make(dtype), torch.rand(3, 3, 13, 10, dtype=dtype)
    for layer in (None, 1, 2) if make is hybrid else (None,):
        e = model.explain(images, TARGET, layer=layer)
        assert torch.equal(e.logits, model(images).detach())
        chosen = e.logits.double().gather(1, e.target)
        size = bound * (chosen.abs() + e.contributions.abs().sum((2, 3, 4), dtype=torch.float64))
        spread = e.placement.spread(e.contribution_map, (13, 10))
        for terms in (e.contributions, e.contribution_map, e.channel_contributions, spread):
            total = terms.double().flatten(2).sum(2) + model.logit_bias
            assert ((total - chosen).abs() <= size).all()
        # linear interpolation keeps the values at the centres of cells, per pixel
        assert e.pixel_map.shape == (3, 2, 13, 10)
        step, cells = int(e.placement.stride[0]), e.contribution_map[0, 0].numel()
        found, expected = e.pixel_map[..., ::step, ::step], e.contribution_map * cells / 130
        torch.testing.assert_close(found, expected, rtol=max(1e-6, bound), atol=1e-9)
        assert (e.completeness_error <= size).all()
        assert e.stem == model.stem_name == "convolutions, stage 1"


def test_contributions_of_the_channels_of_a_stem():
    """Halves of the encoding are added for each feature; the channels of a further layer are as they are."""
    model, images = hybrid(torch.float64, Signed()), torch.rand(3, 3, 9, 9, dtype=torch.float64)
    e = model.explain(images, TARGET)
    halves = e.contributions.sum((3, 4))
    assert e.signed
    assert e.channel_contributions.shape == (3, 2, 4)
    torch.testing.assert_close(e.channel_contributions, halves[:, :, :4] + halves[:, :, 4:])
    assert halves[:, :, :4].any()
    assert halves[:, :, 4:].any()
    assert model.explain(images, layer=1).channel_contributions.shape == (3, 1, 6)
    plain = CoDANet(**LAYERS).explain(torch.rand(1, 3, 9, 9))
    assert plain.channel_contributions.shape == (1, 1, 3)
    e = hybrid(torch.float64).explain(images, TARGET)  # whose features are never negative
    assert not e.signed
    assert torch.equal(e.channel_contributions, e.contributions.sum((3, 4)))


def test_class_activation_maps():
    """The explanation of a CAMNet are its weights times the features; with T pixels it is the average over
    pixels and a linear layer.
    """
    model, images = cam(torch.float64), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    features, weight = model.stem(images).detach(), model.linear.weight.detach()[:, :, 0, 0]
    e = model.explain(images, TARGET)
    maps = weight[torch.tensor(TARGET)][..., None, None] * features[:, None] / 16
    torch.testing.assert_close(e.contribution_map, maps.sum(2))
    torch.testing.assert_close(e.channel_contributions, maps.sum((3, 4)))
    torch.testing.assert_close(model(images), F.linear(features.mean((2, 3)), weight) + model.logit_bias)


# -- the place of contributions
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(12, 20), (23, 9), (17, 30)])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_bright_pixel_is_explained_where_it_is(place, layer):
    """A stem and layers with positive weights and no bias pass a bright pixel on. The middle of its pixel map
    is within half a cell of it.
    """
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))
    model = hybrid(torch.float64, stem, strides=[1, 1, 1])
    with torch.no_grad():
        stem[0].weight.fill_(0.1)
        for each in model.layers:
            each.weight.zero_(), each.bias.fill_(1.0)
    images = torch.zeros(1, 3, 40, 44, dtype=torch.float64)
    images[0, :, place[0], place[1]] = 1.0
    found = model.explain(images, 0, layer=layer).pixel_map[0, 0]
    assert found.min() >= 0
    assert found.sum() > 0
    for axis, expected in enumerate(place):
        numbers = torch.arange(found.shape[axis], dtype=torch.float64)
        middle = float((found.sum(1 - axis) * numbers).sum() / found.sum())
        assert abs(middle - expected) <= 2.0
    shifted = Placement((4.0, 4.0), (8.0, 8.0), None, True)
    assert model.explain(images, 0).placement == Placement((4.0, 4.0), (0.0, 0.0), (11, 11), False)
    assert not torch.allclose(
        shifted.spread(model.explain(images, 0).contribution_map[0, 0], (40, 44)), found
    )


def test_placements_of_layers():
    model, images = hybrid(), torch.rand(1, 3, 16, 12)
    placed = [model.explain(images, layer=layer).placement for layer in (0, 1, 2)]
    assert [p.stride for p in placed] == [(2.0, 2.0), (2.0, 2.0), (4.0, 4.0)]
    assert [p.field for p in placed] == [(11, 11), (15, 15), (19, 19)]
    plain = CoDANet(**LAYERS)
    assert plain.explain(images).placement is None
    assert torch.equal(plain.explain(images).pixel_map, plain.explain(images).contribution_map)
    assert plain.explain(images, layer=2).pixel_map.shape == (1, 1, 16, 12)


def test_no_place_without_an_image():
    e = CoDAHead(4, 3, ranks=[2, 2]).explain(torch.randn(2, 4, 5, 6))
    assert e.images is None
    assert torch.equal(e.pixel_map, e.contribution_map)
    with pytest.raises(ValueError, match="^pixel_map: expected a map whose place in the image is known, got"):
        _ = CoDAHead(4, 3, ranks=[2, 2]).explain(torch.randn(2, 4, 5, 6), layer=1).pixel_map


# -- explanations as objects
# ------------------------------------------------------------------------------------------------------------


def test_saved_and_moved_explanations(tmp_path):
    e = hybrid(class_names=list("abcde")).explain(torch.rand(3, 3, 12, 12), TARGET)
    e.save(tmp_path / "e.safetensors")
    again = Explanation.load(tmp_path / "e.safetensors")
    assert (again.placement, again.stem, again.signed) == (e.placement, e.stem, e.signed)
    assert again.class_names == e.class_names == tuple("abcde")
    assert torch.equal(again.pixel_map, e.pixel_map)
    assert torch.equal(again.channel_contributions, e.channel_contributions)
    assert torch.equal(e[1:].pixel_map, e.pixel_map[1:])
    assert torch.equal(e[[2, 0]].channel_contributions, e.channel_contributions[[2, 0]])
    assert e[0].stem == e.stem
    moved = e.to(torch.float64)
    assert (moved.placement, moved.pixel_map.dtype) == (e.placement, torch.float64)
    assert e.to("meta").pixel_map.shape == (3, 2, 12, 12)
    assert repr(e).startswith("Explanation(3 images, 2 classes each, maps 6 x 6, layer 0, float32 on cpu")


def saved(e, path, **changes):
    """A file of an explanation, whose facts are changed; None: left out."""
    e.save(path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    facts = json.loads(header["facts"]) | changes
    facts = {key: value for key, value in facts.items() if value is not None or key == "class_names"}
    save_file(load_file(path), path, header | {"facts": json.dumps(facts)})
    return path


def test_files_of_a_release_without_stems(tmp_path):
    e = CoDANet(**LAYERS).explain(torch.rand(2, 3, 8, 8))
    again = Explanation.load(saved(e, tmp_path / "e.safetensors", placement=None, stem=None, signed=None))
    assert (again.placement, again.stem, again.signed) == (None, None, True)
    assert torch.equal(again.pixel_map, e.contribution_map)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": 3}, "expected .*stem.*, got .?3"),
        ({"placement": [1, 2]}, "placement: expected assumed, field, first, stride, got"),
        (
            {"placement": {"stride": [0, 1], "first": [0, 0], "field": [1, 1], "assumed": True}},
            "two positive",
        ),
        ({"signed": 1}, "expected a stem and whether its features have signs, got"),
        ({"more": 1}, "expected layer, logit_bias, class_names, placement, stem.*, got"),
    ],
)
def test_damaged_facts(tmp_path, changes, message):
    e = hybrid().explain(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=message) as error:
        Explanation.load(saved(e, tmp_path / "e.safetensors", **changes))
    assert "\n" not in str(error.value)


def texts(figure):
    return " ".join(artist.get_text() for artist in figure.findobj(match=lambda a: hasattr(a, "get_text")))


def test_figures_say_what_is_exact():
    model, images = hybrid(), torch.rand(2, 3, 12, 12)
    found = texts(model.explain(images).plot())
    assert "Exact: the sum over features (convolutions, stage 1)." in found
    assert "Not exact: where in the image" in found
    assert "the input of layer 2 (convolutions, stage 1)" in texts(model.explain(images, layer=2).plot())
    assert "xact:" not in texts(CoDANet(**LAYERS).explain(images).plot())
    shown = model.explain(images)._repr_html_()
    assert "data:image/png;base64," in shown
    assert "maps 6 x 6" in shown


def test_modes_and_contexts():
    model, images = hybrid(torch.float64), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    expected = model.explain(images)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            e = model.explain(images)
            assert torch.equal(e.pixel_map, expected.pixel_map)
    assert all(p.grad is None for p in model.parameters())
    one_by_one = model.explain(images, memory_budget=1)
    torch.testing.assert_close(one_by_one.contributions, expected.contributions)
    with torch.autocast("cpu", torch.bfloat16):
        e = hybrid().explain(images.float())
    assert e.completeness_error.max() < 1e-3
    assert model.explain(images[:0]).pixel_map.shape == (0, 1, 12, 12)


# -- without a stem
# ------------------------------------------------------------------------------------------------------------


def test_without_a_stem_it_is_a_codanet(tmp_path):
    torch.manual_seed(1)
    plain = CoDANet(**LAYERS, class_names=list("abcde"), image_size=12)
    torch.manual_seed(1)
    model = HybridCoDANet(None, **LAYERS, class_names=list("abcde"), image_size=12)
    images, labels = torch.rand(3, 3, 12, 12), F.one_hot(torch.arange(3), 5).float()
    assert list(model.state_dict()) == list(plain.state_dict())
    for each in (model, plain):
        loss = F.binary_cross_entropy_with_logits(each(images), labels)
        (loss + matrix_penalty(each, images, torch.tensor(TARGET))).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    for layer in (None, 2):
        a, b = model.explain(images, TARGET, layer=layer), plain.explain(images, TARGET, layer=layer)
        for name in ("logits", "dynamic_weight", "contributions", "completeness_error", "pixel_map"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert (a.stem, a.placement) == (b.stem, b.placement)
    assert {k: v for k, v in model.config().items() if not k.startswith("stem")} == plain.config()
    for name, each in (("model", model), ("plain", plain)):
        coda_fast.save(each, tmp_path / name)
    first, second = load_file(tmp_path / "model"), load_file(tmp_path / "plain")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    again = coda_fast.load(tmp_path / "model")
    assert type(again) is HybridCoDANet
    assert torch.equal(again(images), plain(images))


# -- heads
# ------------------------------------------------------------------------------------------------------------


def test_a_head_is_the_network_above_the_stem():
    model, images = hybrid(torch.float64), torch.rand(3, 3, 12, 12, dtype=torch.float64)
    head, features = model.head_network(), model.stem(images)
    assert all(a is b for a, b in zip(head.parameters(), model.layers.parameters(), strict=True))
    assert torch.equal(head(features), model(images))
    a, b = head.explain(features, TARGET), model.explain(images, TARGET)
    assert torch.equal(a.contributions, b.contributions)
    assert (a.images, a.stem) == (None, None)
    assert not head.training
    twin = CoDAHead(**head.config(), dtype=torch.float64)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(features), head(features))
    again = HybridCoDANet.around(model.stem, head).eval()
    assert again.config() == model.config() | {"image_size": None, "preprocessing": again.transform.config()}
    assert torch.equal(again(images), model(images))


def test_a_head_on_a_backbone_of_timm():
    backbone = timm.create_model("resnet18", num_classes=0, global_pool="").eval()
    head, images = CoDAHead(512, 3, ranks=[2, 2], channels=[4]), torch.rand(2, 3, 64, 64)
    normalise = lambda x: (x - 0.4) / 0.2
    logits = nn.Sequential(backbone, head)(normalise(images))
    model = head.on(backbone, mean=0.4, std=0.2).eval()
    torch.testing.assert_close(model(images), logits)
    e = model.explain(images)
    assert e.pixel_map.shape == (2, 1, 64, 64)
    assert e.placement.stride == (32.0, 32.0)
    assert model.layers is head.layers
    inside = timm.create_model("resnet18", global_pool="").eval()
    inside.fc = head
    assert inside(images).shape == (2, 3)


def test_a_matrix_penalty_on_a_hybrid():
    """It is the penalty of the head for the features, and its gradients reach a stem that is trained."""
    model, images = hybrid(torch.float64, frozen=False), torch.rand(3, 3, 12, 12, dtype=torch.float64)
    rows = torch.tensor(TARGET)
    penalty = matrix_penalty(model, images, rows)
    assert penalty == matrix_penalty(model.head_network(), model.stem(images), rows)
    penalty.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.layers.parameters())
    assert model.stem.network[0][0].weight.grad.any()
    assert penalty > 0


# -- timm and the hub
# ------------------------------------------------------------------------------------------------------------

TIMM = STEM | dict(out_channels=[8, 6, 5], ranks=[3, 4, 4], num_classes=5)


def of_timm(**options):
    torch.manual_seed(1)
    return timm.create_model("coda_hybrid", **(TIMM | options)).eval()


def test_a_hybrid_of_timm():
    model, images = of_timm(), torch.rand(2, 3, 16, 16)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 4, 4) == (2, 6, 4, 4)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.sum((2, 3)))
    assert model.feature_info == [{"num_chs": 6, "reduction": 4, "module": "layers.1"}]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images), model(images))
    assert again.stem.placement(16, 16) == model.stem.placement(16, 16)
    assert model.explain(images).completeness_error.max() < 1e-5
    model.set_grad_checkpointing()
    assert torch.equal(model(images), again(images))


def test_features_of_a_hybrid_of_timm():
    images = torch.rand(2, 3, 16, 16)
    extractor = timm.create_model("coda_hybrid", features_only=True, **TIMM)
    assert [tuple(f.shape) for f in extractor(images)] == [(2, 6, 4, 4)]
    assert (extractor.feature_info.channels(), extractor.feature_info.reduction()) == ([6], [4])
    assert of_timm(num_classes=0)(images).shape == (2, 6)
    assert of_timm(num_classes=0, global_pool="")(images).shape == (2, 6, 4, 4)


def test_another_classifier_for_timm(tmp_path):
    model, images = of_timm(), torch.rand(2, 3, 16, 16)
    stem, features = copy.deepcopy(model.stem.state_dict()), model.forward_features(images)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert torch.equal(model.forward_features(images), features)
    assert all(torch.equal(tensor, stem[name]) for name, tensor in model.stem.state_dict().items())
    assert model.config()["out_channels"] == [8, 6, 3]
    coda_fast.save(model, tmp_path / "net")
    again = coda_fast.load(tmp_path / "net").eval()
    assert type(again) is HybridCoDANet
    assert torch.equal(again(images), model(images))
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    with pytest.raises(ValueError, match="expected a network with a classifier"):
        model.explain(images)


def test_class_activation_networks_of_timm():
    kind, images = timm_models.timm_class(CAMNet), torch.rand(2, 3, 16, 16)
    name = next(name for name, model in registry.models().items() if model.network is CAMNet)
    torch.manual_seed(1)
    model = timm.create_model(name, **STEM, num_classes=5, temperature=16).eval()
    assert isinstance(model, kind)
    assert torch.equal(model(images), cam()(images))
    features = model.forward_features(images)
    assert torch.equal(features, model.stem(images))
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert torch.equal(model.forward_features(images), features)
    model.reset_classifier(0)
    assert torch.equal(model(images), features.sum((2, 3)))
    with pytest.raises(ValueError, match="^features_only: expected a network with a sequence of stages"):
        timm.create_model(name, features_only=True, **STEM, num_classes=5)


def test_a_hybrid_in_a_folder_of_the_hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the extra coda-fast[hub]")
    from coda_fast.hub import HubCoDANet, HubHybridCoDANet

    model, images = hybrid(), torch.rand(2, 3, 12, 12)
    wrapped = HubHybridCoDANet.from_model(model)
    assert all(a is b for a, b in zip(wrapped.parameters(), model.parameters(), strict=True))
    assert torch.equal(wrapped(images), model(images))
    wrapped.save_pretrained(tmp_path)
    again = HubHybridCoDANet.from_pretrained(tmp_path)
    assert torch.equal(again(images), model(images))
    assert again.config() == model.config()
    assert torch.equal(coda_fast.load(tmp_path / "model.safetensors").eval()(images), model(images))
    with pytest.raises(
        coda_fast.CheckpointError, match="expected a config.json with the arguments of CoDANet"
    ):
        HubCoDANet.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected a CoDANet for HubCoDANet, got a HybridCoDANet"):
        HubCoDANet.from_model(model)


# -- compilers and exporters
# ------------------------------------------------------------------------------------------------------------


def test_a_compiled_hybrid():
    model, images = hybrid(torch.float64, frozen=False).train(), torch.rand(3, 3, 12, 12, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(images).square().sum().backward()
    torch.testing.assert_close(compiled(images), model(images))
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_exported_program_of_a_hybrid():
    model, dim = hybrid(torch.float64), torch.export.Dim.DYNAMIC
    explainer = coda_fast.Explainer(model)
    example = torch.rand(2, 3, 12, 16, dtype=torch.float64), torch.tensor([1, 2])
    shapes = {"images": {0: dim, 2: dim, 3: dim}, "target": {0: dim}}
    program = torch.export.export(explainer, example, dynamic_shapes=shapes).module()
    for size in ((2, 12, 16), (3, 18, 14)):
        images, target = torch.rand(size[0], 3, *size[1:], dtype=torch.float64), torch.arange(size[0])
        logits, contribution_map = program(images, target)
        e = model.explain(images, target)
        torch.testing.assert_close(logits, e.logits)
        torch.testing.assert_close(contribution_map, e.contribution_map[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("make", [hybrid, cam])
def test_an_onnx_file_of_a_hybrid(tmp_path, make):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra coda-fast[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra coda-fast[onnx]")
    from coda_fast.export import export_onnx

    model, path = make(), tmp_path / "net.onnx"
    export_onnx(model, path, explain=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for size in ((1, 16, 16), (3, 12, 18)):
        images, target = torch.rand(size[0], 3, *size[1:]), torch.arange(size[0])
        found = session.run(None, {names[0]: images.numpy(), names[1]: target.numpy()})
        logits, contribution_map = map(torch.from_numpy, found)
        e = model.explain(images, target)
        torch.testing.assert_close(logits, e.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(contribution_map, e.contribution_map[:, 0], rtol=1e-4, atol=1e-5)
        total = contribution_map.sum((1, 2)) + model.logit_bias
        torch.testing.assert_close(total, logits.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_hybrid_is_traced_by_fx():
    model, images = hybrid(), torch.rand(2, 3, 12, 12)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


# -- other methods and the evaluation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [hybrid, cam])
@pytest.mark.parametrize("method", ["Ours", "GCam", "Grad", "IxG", "GB", "DeepLIFT", "Occ5"])
def test_methods_on_hybrids(make, method):
    pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    model, images, targets = make(), torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
    before = copy.deepcopy(model.state_dict())
    found = baselines.create(method, model).attribute(images, targets)
    assert found.shape == (2, 16, 16)
    assert torch.isfinite(found).all()
    assert found.any()
    if method == "Ours":
        assert torch.equal(found, model.explain(images, targets[:, None]).pixel_map[:, 0])
    if method in ("Grad", "IxG"):
        leaf = images.clone().requires_grad_()
        model(leaf).gather(1, targets[:, None]).sum().backward()
        gradient = leaf.grad * (leaf.detach() if method == "IxG" else 1)
        torch.testing.assert_close(found, gradient.sum(1), rtol=1e-3, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in model.stem.parameters()) or make is cam


def test_no_two_methods_are_the_same_on_a_stem():
    pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    model, images, targets = hybrid(stem=Signed()), torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
    assert baselines.twins_on(model) == baselines.twins_on(cam()) == {}
    plain = CoDANet(**LAYERS)
    assert baselines.twins_on(plain) == baselines.twins_on(HybridCoDANet(None, **LAYERS)) == baselines.TWINS
    for method, other in baselines.TWINS.items():
        a, b = (baselines.create(m, model).attribute(images, targets) for m in (method, other))
        assert float((a - b).abs().max()) > 1e-2 * float(b.abs().max()), (method, other)
        a, b = (baselines.create(m, plain).attribute(images, targets) for m in (method, other))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class Functional(Signed):
    """The same stem with a function in place of a module."""

    def forward(self, images):
        first, norm, _, last = self.layers
        return last(F.relu(norm(first(images))))


@pytest.mark.parametrize("method", ["GB", "DeepLIFT"])
def test_methods_see_activations_that_are_functions(method):
    pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    model, images, targets = hybrid(stem=Signed()), torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
    other = hybrid(stem=Functional())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    a, b = (baselines.create(method, each).attribute(images, targets) for each in (other, model))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [hybrid, cam])
@pytest.mark.parametrize("insert", [False, True])
def test_pixels_are_removed_from_the_image(make, insert):
    """Removal makes pixels of the image black, not features, which would keep what their neighbours saw."""
    model, images = make(torch.float64), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    targets, maps = torch.tensor([1, 4, 0]), torch.rand(3, 8, 8, dtype=torch.float64)
    options = dict(fraction=1.0, points=5, insert=insert)
    found = evaluation.pixel_removal(
        model, images, targets, lambda x, c: maps[:, None], **options
    ).probabilities
    ranks = maps.flatten(1).argsort().argsort().view(3, 8, 8)
    for point, count in enumerate((0, 16, 32, 48, 64)):
        kept = ((ranks < count) == insert)[:, None]
        expected = model(images * kept).sigmoid().gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found[:, point].double(), expected, rtol=1e-5, atol=1e-7)
    by_default = evaluation.pixel_removal(model, images, targets, **options).probabilities
    by_hand = evaluation.pixel_removal(
        model, images, targets, lambda x, c: model.explain(x, c).pixel_map, **options
    ).probabilities
    assert torch.equal(by_default, by_hand)


@pytest.mark.parametrize("make", [hybrid, cam])
def test_localisation_takes_the_pixel_map(make):
    model, images = make(), torch.rand(10, 3, 8, 8)
    labels = torch.arange(10) % 5
    logits = torch.where(F.one_hot(labels, 5).bool(), 4.0, -4.0)
    by_default = evaluation.localisation(model, images, labels, side=2, logits=logits)
    by_hand = evaluation.localisation(
        model, images, labels, lambda x, c: model.explain(x, c).pixel_map, side=2, logits=logits
    )
    assert torch.equal(by_default.scores, by_hand.scores)
    assert 0 < by_default.summary()["mean"] < 1
