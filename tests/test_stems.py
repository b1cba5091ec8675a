"""Stems of timm, registered ones and modules: their features, modes and arguments; and the encoding of
features by the signs.
"""

import copy
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from coda_fast import CoDAHead, DAUConv2d, HybridCoDANet, stems
from coda_fast.nn import SplitSigns
from coda_fast.stems import Stem, register_stem

SMALL = {"widths": [4, 6], "strides": [1, 2]}
LAYERS = dict(out_channels=[6, 5], ranks=[3, 4], kernel_sizes=[3, 1], strides=[1, 1], temperature=5.0)
SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def registering(monkeypatch):
    """``register_stem``, whose stems are forgotten after the test."""
    monkeypatch.setattr(stems, "_STEMS", dict(stems._STEMS))
    return register_stem


def stages():
    """A module in three stages, with normalisation, dropout and features of both signs."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3, 1, 1),
    )


# -- the signs of features
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_are_the_difference_of_the_halves(dtype):
    features = torch.randn(2, 5, 4, 3, dtype=dtype)
    features[0, 0, 0] = 0.0
    plus, minus = SplitSigns()(features).chunk(2, 1)
    assert torch.equal(plus - minus, features)
    assert plus.min() >= 0
    assert minus.min() >= 0
    assert not (plus * minus).any(), "a feature is in one half only"
    assert SplitSigns()(features[0]).shape == (10, 4, 3)
    assert torch.autograd.gradcheck(
        SplitSigns(), (torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True),)
    )


def ratios_to_the_opposite(layer, encode):
    """The responses of units to -f, relative to those to f, for one f."""
    features = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    return (layer(encode(-features)) / layer(encode(features))).detach().flatten()


def test_a_unit_cannot_tell_a_feature_from_its_opposite_without_the_split():
    """Without a bias of the weight, w(-f) = -w(f), so that the response to -f is that to f, whatever the
    weights are; a bias makes it -1 times that. With the halves, f and -f share no direction.
    """
    even = DAUConv2d(4, 6, 1, rank=3, bias=False, dtype=torch.float64)
    torch.testing.assert_close(ratios_to_the_opposite(even, lambda f: f), torch.ones(6, dtype=torch.float64))
    odd = DAUConv2d(4, 6, 1, rank=3, norm="l2", dtype=torch.float64)
    nn.init.zeros_(odd.weight)
    torch.testing.assert_close(ratios_to_the_opposite(odd, lambda f: f), -torch.ones(6, dtype=torch.float64))
    split = DAUConv2d(8, 6, 1, rank=3, dtype=torch.float64)
    ratios = ratios_to_the_opposite(split, SplitSigns())
    assert (ratios.abs() - 1).abs().min() > 0.01
    with torch.no_grad():  # a unit that responds to f > 0 alone
        split.weight.zero_(), split.bias.zero_()
        split.bias[:, :4] = 1.0
    features = torch.rand(1, 4, 1, 1, dtype=torch.float64)
    assert (split(SplitSigns()(features)) > 0.1).all()
    assert not split(SplitSigns()(-features)).any()


class Call(nn.Module):
    """A convolution, and a function of its result."""

    def __init__(self, function):
        super().__init__()
        self.convolution, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, images):
        return self.function(self.convolution(images))


@pytest.mark.parametrize(
    ("function", "signed"),
    [
        (F.relu, False),
        (lambda x: x.relu_(), False),
        (nn.ReLU(inplace=True), False),
        (lambda x: [x, x.relu()], False),
        (lambda x: x.relu() - 0.1, True),
        (F.gelu, True),
        (lambda x: x, True),
        (lambda x: x.sigmoid(), True),
        (lambda x: [x.relu(), x], True),
        (lambda x: (x, x.relu())[0], True),
    ],
)
def test_features_after_a_relu_are_not_doubled(function, signed):
    torch.manual_seed(1)
    model = HybridCoDANet(Call(function), **LAYERS).eval()
    assert model.stem.signed == model.signed == signed
    assert model.layers[0].in_channels == (8 if signed else 4)
    images = torch.rand(2, 3, 8, 8)
    encoded, features = model.encoder(images), model.stem(images)
    torch.testing.assert_close(encoded[:, :4] - encoded[:, 4:] if signed else encoded, features)
    assert model.explain(images).signed == signed
    doubled = HybridCoDANet(Call(function), **LAYERS, signed=True).eval()
    assert doubled.layers[0].in_channels == 8
    head = doubled.head_network()
    assert (head.signed, head.image_channels) == (True, 4)


# -- networks of timm
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "stage", "side"),
    [
        ("resnet18", 1, "layer1", 40),
        ("convnext_atto", "stages.1", "stages.1", 48),
        (SWIN, 0, "layers.0", 224),
        ("vit_tiny_patch16_224", -11, "blocks.1", 224),
        ("mobilenetv3_small_050", -4, "blocks.0", 48),
    ],
)
def test_stems_of_timm(name, at, stage, side):
    """The features are timm's for the normalised image, whether the stage is an index or a name."""
    stem = Stem(name, at)
    assert stem.stages[stem.at] == stage
    assert stem.in_words() == f"{name}, {stage}"
    by_index, by_name = (Stem(name, other).in_words() for other in (stem.at, stage))
    assert by_index == by_name == stem.in_words()
    plain = timm.create_model(name, features_only=True, out_indices=(stem.at,)).eval()
    own = stem.network[0] if "swin" in name else stem.network
    plain.load_state_dict(own.state_dict())
    config = timm.models.get_pretrained_cfg(name)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (config.mean, config.std))
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = plain((images - mean) / std)[0]
        found = stem(images)
    if "swin" in name:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (1, stem.channels, *stem.size(side, side))
    assert stem.stride() == side // found.shape[2]
    crop = stem.preprocessing
    assert (crop.crop, crop.interpolation) == (config.input_size[1], config.interpolation)


@pytest.mark.parametrize(
    ("mean", "std"), [(None, None), (0.5, 0.25), ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)), ([0.2] * 3, 1)]
)
def test_normalisation_is_inside(mean, std):
    module = nn.Conv2d(3, 4, 3)
    stem, images = Stem(module, mean=mean, std=std), torch.rand(2, 3, 6, 6)
    shift, scale = (
        torch.tensor(default if value is None else value).expand(3).view(3, 1, 1)
        for value, default in ((mean, 0.0), (std, 1.0))
    )
    torch.testing.assert_close(stem(images), module((images - shift) / scale))


def test_normalisation_of_grey_images_is_the_mean_over_colours():
    stem = Stem("resnet18", 0, image_channels=1)
    config = timm.models.get_pretrained_cfg("resnet18")
    assert float(stem.mean) == pytest.approx(sum(config.mean) / 3)
    assert float(stem.std) == pytest.approx(sum(config.std) / 3)
    assert stem(torch.rand(1, 1, 16, 16)).shape == (1, 64, 8, 8)


def test_a_transformer_for_another_size_of_images():
    stem = Stem("vit_tiny_patch16_224", 0, options={"img_size": 64})
    assert stem.size(64, 64) == (4, 4)


# -- modules and registered stems
# ------------------------------------------------------------------------------------------------------------


def test_a_sequential_is_cut():
    images, whole = torch.rand(2, 3, 8, 8), stages().eval()
    for at in (0, "0", -3):
        torch.testing.assert_close(Stem(whole, at)(images), whole[0](images))
    stem = Stem(whole)
    assert (stem.stages, stem.at, stem.channels, stem.name) == (["0", "1", "2"], 2, 5, None)
    assert torch.equal(stem(images), whole(images))
    assert stem.network[2] is whole[2], "the module is shared"


def test_a_registered_stem(registering):
    def make(channels, width=3):
        return nn.Sequential(nn.Conv2d(channels, width, 3), nn.Tanh())

    registering("two_stages", make)
    registering("two_stages", make)  # the same again
    stem = Stem("two_stages", 0, options={"width": 7}, image_channels=1)
    assert (stem.channels, stem.in_words()) == (7, "two_stages, stage 0")
    with pytest.raises(ValueError, match="name: expected an identifier that no other stem has"):
        registering("two_stages", lambda channels: make(channels))
    with pytest.raises(ValueError, match="stem_options: expected those of 'two_stages', got {'depth': 3}"):
        Stem("two_stages", options={"depth": 3})


@pytest.mark.parametrize("name", ["a stem", "resnet18.a1_in1k", "hf-hub:x/y", "", "convolutions", 3])
def test_names_that_no_stem_can_have(registering, name):
    with pytest.raises(ValueError, match="^name: expected an identifier that no other stem has, got "):
        registering(name, lambda channels: nn.Sequential(nn.Conv2d(channels, 2, 1)))


def test_a_registered_stem_hides_a_model_of_timm(registering):
    registering("resnet18", lambda channels: nn.Sequential(nn.Conv2d(channels, 2, 1)))
    assert Stem("resnet18").channels == 2


def test_functions_that_make_no_stem(registering):
    with pytest.raises(TypeError, match="^make: expected a function that makes an nn.Sequential, got 3"):
        registering("three", 3)
    registering("single", lambda channels: nn.Conv2d(channels, 4, 3))
    with pytest.raises(ValueError, match="^stem: expected 'single' to be an nn.Sequential, got a Conv2d"):
        Stem("single")


# -- modes
# ------------------------------------------------------------------------------------------------------------


def hybrid(stem, **options):
    torch.manual_seed(1)
    return HybridCoDANet(stem, **LAYERS, **options)


def statistics(model):
    return {name: t.clone() for name, t in model.stem.state_dict().items() if "running" in name}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_of_training(frozen):
    model = hybrid("convolutions", at=1, stem_options=SMALL, frozen=frozen)
    model.eval(), model.train()
    assert model.stem.training
    assert [m.training for m in model.stem.network.modules()] == [not frozen] * len(
        list(model.stem.network.modules())
    )
    assert all(p.requires_grad != frozen for p in model.stem.parameters())
    before = statistics(model)
    assert before
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all((p.grad is None) == frozen for p in model.stem.parameters())
    assert all(p.grad is not None for p in model.layers.parameters())
    for name, tensor in statistics(model).items():
        assert torch.equal(tensor, before[name]) == frozen, name


def test_a_frozen_stem_stays_in_evaluation_mode_in_a_wrapper():
    model = nn.Sequential(hybrid(stages(), at=2)).train()
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(model(images), model(images)), "dropout is off"
    assert torch.equal(model(images), model.eval()(images))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.1)), "1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4)), "1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(timm.layers.DropPath(0.1))), "1.0"),
    ],
)
def test_a_stem_in_training_mode_is_not_explained(module, name):
    model, images = hybrid(module, frozen=False).train(), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=f"^model: expected evaluation mode .*, got {name} of") as error:
        model.explain(images)
    assert "\n" not in str(error.value)
    assert model.eval().explain(images).completeness_error.max() < 1e-5


def test_norms_without_statistics_are_never_explained():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="^model: expected "):
        hybrid(module).eval().explain(torch.rand(2, 3, 8, 8))


def trained_beside(model, work):
    """The weights after some steps of training, during which ``work(0)`` to ``work(2)`` run in threads."""
    images, labels = torch.rand(4, 3, 12, 12).double(), torch.eye(5)[:4].double()
    optimizer, failures = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []

    def watched(number):
        try:
            work(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    for _ in range(20):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), labels).backward()
        optimizer.step()
    [thread.join() for thread in threads]
    assert not failures
    return model.state_dict()


def assert_undisturbed(make, work):
    """Assert that training ends the same whether or not ``work`` runs beside it."""
    torch.manual_seed(3)
    alone = trained_beside(make(), lambda number: None)
    torch.manual_seed(3)
    together = trained_beside(make(), work)
    assert all(torch.equal(alone[name], tensor) for name, tensor in together.items())


def test_explaining_in_threads_while_a_head_trains():
    """Two networks share a frozen stem: one trains its head while the other explains images of ever other
    sizes.
    """
    explained = hybrid(stages(), at=2, dtype=torch.float64).eval()

    def make():
        return HybridCoDANet.around(explained.stem, copy.deepcopy(explained.head_network())).train()

    def explain(number):
        for side in range(8, 16):
            found = explained.explain(torch.rand(1, 3, side + number, side, dtype=torch.float64))
            assert found.placement.stride == (2.0, 2.0)
            assert found.pixel_map.shape[2:] == (side + number, side)
            assert found.completeness_error.max() < 1e-12

    assert_undisturbed(make, explain)


def test_asking_for_places_in_threads_while_a_stem_trains():
    """Sizes and places of features are found without changing the mode of the network that trains."""
    module = stages()
    del module[1]  # dropout would draw in another order
    models = []

    def make():
        models.append(hybrid(copy.deepcopy(module), at=1, frozen=False, dtype=torch.float64).train())
        return models[-1]

    def ask(number):
        stem = models[-1].stem
        for side in range(8, 24):
            height = 40 * number + side
            assert stem.size(height, side) == ((height + 1) // 2, (side + 1) // 2)
            assert stem.placement(height, side).stride == (2.0, 2.0)

    assert_undisturbed(make, ask)


# -- arguments that are refused
# ------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


CONV = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("stem", "options", "error", "message"),
    [
        (Plain(lambda x: x.flatten(0, 1)[None]), {}, ValueError, "stem: expected features whose shape does"),
        (Plain(lambda x: x.flatten(2)), {}, ValueError, r"stem: .*\[N, C, H, W\], got shape \[1, 3, 4096\]"),
        (Plain(lambda x: [x, x.mean((2, 3))]), {}, ValueError, r"stem: .* got shape \[1, 3\]"),
        (Plain(lambda x: {"x": x}), {}, ValueError, r"stem: .*\[N, C, H, W\], got dict"),
        (nn.Conv2d(4, 4, 3), {}, ValueError, r"stem: expected a network of images \[N, 3, 64, 64\], got"),
        (3, {}, TypeError, "stem: expected the name of a network or a module, got int"),
        ("resnet17", {}, ValueError, "stem: expected a model of timm or a registered stem .*'resnet17'"),
        ("", {}, ValueError, "stem: expected a model of timm or a registered stem"),
        ("hf-hub:x/y", {}, ValueError, "stem: expected a model of timm or a registered stem"),
        ("local-dir:/tmp", {}, ValueError, "stem: expected a model of timm or a registered stem"),
        ("resnet18.nope", {}, ValueError, r"stem: expected weights of resnet18 that timm has \(resnet18.a1"),
        ("resnet18", {"at": 5}, ValueError, "at: expected a stage, 0 to 4 or one of act1, layer1, .* got 5"),
        ("resnet18", {"at": -6}, ValueError, "at: expected a stage, 0 to 4 .* got -6"),
        ("resnet18", {"at": "layer9"}, ValueError, "at: expected a stage, .* got 'layer9'"),
        ("resnet18", {"at": True}, ValueError, "at: expected a stage, .* got True"),
        ("convolutions", {"at": 1.0}, ValueError, "at: expected a stage, 0 to 3 or one of 0, 1, 2, 3, got"),
        (CONV, {"at": 0}, ValueError, "at: expected -1, the whole of a Conv2d, or an nn.Sequential"),
        ("resnet18", {"options": {"checkpoint_path": "x"}}, ValueError, "stem_options: .*'checkpoint_path'"),
        ("resnet18", {"options": {"pretrained": True}}, ValueError, "stem_options: .*'pretrained'"),
        ("resnet18", {"options": {"pretrained_cfg": {}}}, ValueError, "stem_options: .*'pretrained_cfg'"),
        ("resnet18", {"options": {"pretrained_cfg_overlay": {}}}, ValueError, "stem_options: .*overlay'"),
        ("resnet18", {"options": {"cache_dir": "x"}}, ValueError, "stem_options: .*'cache_dir'"),
        ("resnet18", {"options": {"nope": 1}}, ValueError, "stem: timm makes no feature extractor of 'resne"),
        ("convolutions", {"options": {"widths": [1 << 15]}}, ValueError, "stem_options: widths: expected a"),
        (CONV, {"mean": [0.5, 0.5]}, ValueError, r"mean: expected 3 numbers, got \[0.5, 0.5\]"),
        (CONV, {"mean": "grey"}, ValueError, "mean: expected a number, got 'grey'"),
        (CONV, {"std": 0}, ValueError, "std: expected 3 numbers above 0, got 0"),
        (CONV, {"std": [1, -1, 1]}, ValueError, "std: expected 3 numbers above 0"),
        (CONV, {"std": float("nan")}, ValueError, "std: expected a finite number"),
        (CONV, {"frozen": 1}, ValueError, "frozen: expected True or False, got 1"),
        (CONV, {"weights": "pretrained"}, ValueError, "stem_weights: expected a file for Conv2d"),
        ("convolutions", {"weights": "no.file"}, FileNotFoundError, "no.file: no such checkpoint"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(stem, options, error, message):
    with pytest.raises(error, match=f"^{message}") as refused:
        Stem(stem, **options)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("stem", "options", "named"),
    [
        ("convolutions", {"options": {"widths": [-1], "strides": [1]}}, "stem_options"),
        ("convolutions", {"options": {"widths": [], "strides": []}}, "stem_options"),
        ("convolutions", {"options": {"strides": [1]}}, "stem_options"),
        ("vit_tiny_patch16_224", {"options": {"patch_size": 0}}, "stem"),
        ("resnet18", {"options": {"layers": []}}, "stem"),
        ("resnet18", {"options": 5}, "stem_options"),
        ("convolutions", {"image_channels": 0}, "image_channels"),
        ("convolutions", {"image_channels": "3"}, "image_channels"),
        ("convolutions", {"image_channels": 2.5}, "image_channels"),
        (nn.Sequential(), {}, "stem"),
    ],
    ids=str,
)
def test_arguments_whose_errors_should_name_them(stem, options, named):
    with pytest.raises((ValueError, TypeError), match=f"^{named}: ") as error:
        Stem(stem, **options)
    assert "\n" not in str(error.value)


def test_a_head_on_a_backbone_with_other_channels():
    with pytest.raises(ValueError, match="^backbone: expected features of 7 channels, got 5$"):
        CoDAHead(7, 3).on(stages())


def test_images_that_the_network_does_not_take():
    stem = Stem("vit_tiny_patch16_224", 0)
    with pytest.raises(
        ValueError, match=r"stem: expected a network of images \[N, 3, 80, 80\], got"
    ) as error:
        stem.size(80, 80)
    assert "\n" not in str(error.value)


class OfTwo(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())


@pytest.mark.parametrize("at", [-1, 0])
def test_a_sequential_with_a_constructor_of_its_own(at):
    module, images = OfTwo(), torch.rand(2, 3, 6, 6)
    expected = module[0](images)
    torch.testing.assert_close(Stem(module, at)(images), expected if at == 0 else expected.relu())
