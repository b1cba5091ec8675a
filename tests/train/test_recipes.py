"""Recipes: the published learning rates epoch by epoch, and the keys and values that are accepted."""

import pytest
import torch

import coda_fast
from coda_fast.data.sources import Process
from coda_fast.train import TrainingError, list_recipes, load_recipe
from coda_fast.train.optimization import make_schedule, set_rate
from coda_fast.train.setup import split_batch


def rates(recipe, steps=10):
    """The learning rate of the first step of every epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate())
    schedule = make_schedule(recipe, optimizer, steps)
    return [set_rate(schedule, epoch, epoch * steps) for epoch in range(recipe.epochs)]


def test_every_recipe_names_a_model_and_says_what_it_is():
    found = list_recipes()
    assert {
        "digits-s",
        "cifar10-s",
        "cifar10-s-fast",
        "tiny-imagenet-s",
        "imagenet100-l",
        "imagenet1k-l",
    } <= set(found)
    for name, about in found.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert "published" in about or "ours" in about
        coda_fast.create_model(recipe.model.name, device="meta", **recipe.model.arguments())
        assert len(rates(recipe)) == recipe.epochs


def test_cifar10_is_as_published():
    recipe = load_recipe("cifar10-s")
    assert (recipe.epochs, recipe.batch_size, recipe.micro_batch) == (200, 16, 8)
    assert split_batch(recipe, Process(0, 1)) == (16, 8)  # two micro-batches of eight before each update
    # 2.5e-4 * 1.5^-floor(epoch / 30), by hand at the edges and by the formula in between
    found = rates(recipe)
    by_hand = {
        0: 2.5e-4,
        29: 2.5e-4,
        30: 1.6666667e-4,
        59: 1.6666667e-4,
        60: 1.1111111e-4,
        90: 7.4074074e-5,
        180: 2.1947874e-5,
        199: 2.1947874e-5,
    }
    for epoch, rate in by_hand.items():
        assert found[epoch] == pytest.approx(rate, rel=1e-6), epoch
    for epoch, rate in enumerate(found):
        assert rate == pytest.approx(2.5e-4 / 1.5 ** (epoch // 30), rel=1e-12)
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas, optimizer.clip) == (
        "adam",
        0.0,
        [0.9, 0.999],
        None,
    )
    assert (recipe.data.flip, recipe.data.pad) == (True, 4)
    model = coda_fast.create_model(recipe.model.name, **recipe.model.arguments())
    assert sum(p.numel() for p in model.parameters()) == 7_782_816
    assert model.temperature == 1000


@pytest.mark.parametrize("temperature", [10, 50, 100, 500, 1000, 5000, 10000])
@pytest.mark.parametrize(("rank", "millions"), [(4, 1.08), (8, 2.03), (16, 3.95), (144, 34.6)])
def test_the_ablations_are_options(temperature, rank, millions):
    recipe = load_recipe(
        "cifar10-s", [f"model.temperature={temperature}", f"model.rank={rank}", "model.norm=l2"]
    )
    model = coda_fast.create_model(recipe.model.name, device="meta", **recipe.model.arguments())
    assert model.temperature == temperature
    assert model.layers[0].norm == "l2"
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_imagenet100_is_as_published():
    recipe = load_recipe("imagenet100-l")
    assert (recipe.epochs, recipe.batch_size) == (60, 64)
    found = rates(recipe)
    ramp = [2.5e-4 + 7.5e-4 * i / 14 for i in range(15)]  # linspace(2.5e-4, 1e-3, 15)
    expected = ramp + [1e-3] * 5 + [5e-4] * 20 + [2.5e-4] * 20
    assert len(expected) == 60
    assert found == pytest.approx(expected, rel=1e-12)
    data = recipe.data
    assert (data.resize, data.size, data.flip, data.classes, data.scale) == (256, 240, True, 100, None)
    assert (data.randaugment.n, data.randaugment.m) == (2, 10)
    assert recipe.evaluation.every == 2
    assert coda_fast.create_model(recipe.model.name, device="meta").temperature == 1e5


@pytest.mark.parametrize(("rule", "expected"), [("none", 1e-3), ("linear", 4e-3), ("sqrt", 2e-3)])
def test_the_rule_of_the_learning_rate(rule, expected):
    options = ["optimizer.lr=1e-3", f"optimizer.rule={rule}", "batch_size=64"]
    if rule != "none":
        options.append("optimizer.reference_batch=16")
    recipe = load_recipe("digits-s", options)
    assert recipe.learning_rate() == pytest.approx(expected)


def test_cosine_warms_up_and_ends_at_nothing():
    recipe = load_recipe("digits-s", ["epochs=10", "schedule.warmup=2", "optimizer.lr=1"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    schedule = make_schedule(recipe, optimizer, 5)
    found = [set_rate(schedule, update // 5, update) for update in range(50)]
    # the warm-up rises in equal steps from lr / number of steps
    assert found[:3] == pytest.approx([0.1, 0.19, 0.28])
    assert found[10] == pytest.approx(1)
    assert found[30] == pytest.approx(0.5)  # the middle of the remaining 40 epochs
    assert 0 < found[-1] < 0.002


def test_overrides_are_typed(tmp_path):
    recipe = load_recipe(
        "digits-s",
        ["model.temperature=1e3", "ema.decay=0.5", "data.flip=true", "model.out_channels=[8, 10]", "seed=7"],
    )
    assert (recipe.model.temperature, recipe.ema.decay, recipe.data.flip, recipe.seed) == (
        1000.0,
        0.5,
        True,
        7,
    )
    assert recipe.model.out_channels == [8, 10]
    own = tmp_path / "own.yaml"
    own.write_text(recipe.to_yaml())
    assert load_recipe(str(own)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "unknown key 'lr'; near to it: optimizer.lr"),
        ("model.temprature=1", "unknown key 'model.temprature'; near to it: model.temperature"),
        ("zzzzzz=1", "unknown key 'zzzzzz'$"),
        ("epochs", "expected key=value, got 'epochs'"),
        ("epochs=0", "epochs: expected greater than or equal to 1, got 0"),
        ("epochs=some", "epochs: expected .*integer.*, got 'some'"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than 0, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr: expected .*got nan"),
        ("precision=float8", "precision: expected 'float32', 'bfloat16' or 'float64', got 'float8'"),
        ("schedule.kind=step", "schedule: expected every and divisor"),
        (
            "schedule={kind: pieces, pieces: [[0, 5, 1, 1], [6, 5, 1, 1]]}",
            "expected one that begins at epoch 5, got 6",
        ),
        ("schedule={kind: pieces, pieces: [[0, 5, 1, 1]]}", "expected learning rates for 20 epochs, got 5"),
        ("optimizer.rule=sqrt", "optimizer.reference_batch: expected the batch"),
        ("data.resize=256", "data.size: expected a crop of at most data.resize"),
        ("data.zoom=1", "unknown key 'data.zoom'"),
        ("data={kind: digits, zoom: 1}", "unknown key 'data.zoom'"),
        ("model=[", "model: not YAML"),
        ("model.freeze=*", "text that begins with such a sign needs quotes"),
        ("model.weights=", "model.weights: expected a value after the sign, null for none, got nothing"),
    ],
)
def test_what_a_recipe_refuses(override, message):
    with pytest.raises(TrainingError, match=message):
        load_recipe("digits-s", [override])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "cifar10-s",
            "schedule.warmup=5",
            "schedule.warmup: expected schedule.kind=cosine beside it, without which it changes nothing",
        ),
        ("digits-s", "schedule.every=5", "schedule.every: expected schedule.kind=step beside it"),
        (
            "digits-s",
            "data.val_path=/nowhere",
            "data.val_path: expected data.kind=folder or data.kind=webdataset beside it",
        ),
        ("digits-s", "data.in_memory=true", "data.in_memory: expected data.kind=folder beside it"),
        (
            "digits-s",
            "loss.matrix_norm=l2",
            "loss.matrix_norm: expected loss.matrix_weight above 0 beside it",
        ),
        ("digits-s", "ema.warmup=true", "ema.warmup: expected ema.decay above 0 beside it"),
        ("cifar10-s", "data.workers=8", "data.workers: expected data.kind=folder or data.kind=webdataset"),
        ("digits-s", "data.max_corrupt=1", "data.max_corrupt: expected data.kind=npz or data.kind=cifar10"),
        ("tiny-imagenet-s", "data.interpolation=bicubic", "data.interpolation: expected data.size beside it"),
        (
            "cifar10-s",
            "optimizer.reference_batch=16",
            "optimizer.reference_batch: expected optimizer.rule=linear or optimizer.rule=sqrt beside it",
        ),
        (
            "imagenet100-l",
            "optimizer.lr=1e-5",
            "optimizer.lr: expected 0.00025, with which schedule.pieces begin, got 1e-05",
        ),
    ],
)
def test_a_change_that_changes_nothing_is_refused(name, override, message):
    with pytest.raises(TrainingError, match=message):
        load_recipe(name, [override])


def test_the_interval_of_maps_is_refused_without_maps():
    with pytest.raises(TrainingError, match="log.maps_every: expected log.maps above 0 beside it"):
        load_recipe("digits-s", ["log.maps=0", "log.maps_every=5"])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("imagenet1k-l", ["ema.decay=0", "ema.warmup=false"]),
        ("tiny-imagenet-s", ["data.kind=webdataset", "data.in_memory=false"]),
        ("digits-s", ["schedule.kind=constant", "schedule.warmup=0"]),
        ("cifar10-s", ["loss.matrix_weight=0", "loss.matrix_norm=l1"]),
        ("cifar10-s", ["schedule.kind=cosine", "schedule.every=null"]),
    ],
)
def test_what_is_off_may_be_said_to_be_off(name, overrides):
    load_recipe(name, overrides)


def test_what_a_recipe_leaves_unused_beside_a_change_is_no_error():
    assert load_recipe("cifar10-s", ["schedule.kind=cosine"]).schedule.every == 30


def test_pieces_go_by_the_rule_too():
    large = load_recipe(
        "imagenet100-l", ["batch_size=1024", "optimizer.rule=sqrt", "optimizer.reference_batch=64"]
    )
    assert rates(large) == pytest.approx([4 * rate for rate in rates(load_recipe("imagenet100-l"))])


def test_a_recipe_that_is_no_text(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_bytes("about: gr\u00fcn".encode("latin-1"))
    with pytest.raises(TrainingError, match="own.yaml: expected a text file in UTF-8"):
        load_recipe(str(own))


def test_an_unknown_recipe_names_those_there_are():
    known = r"expected one of cifar10-cnn, .*cifar10-s, .*digits-s.* or a .yaml file, got 'cifar'"
    with pytest.raises(TrainingError, match=known):
        load_recipe("cifar")
    with pytest.raises(TrainingError, match="recipe: no such file: mine.yaml"):
        load_recipe("mine.yaml")


def _laughs():
    """The "billion laughs": aliases that expand a few lines to a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_laughs(), "expected at most 10000 values, aliases counted as what they stand for, got more"),
        ("about: &a [*a]", "expected values at most 20 deep, got deeper ones"),
        ("data: &d {kind: digits, path: *d}", "expected values at most 20 deep"),
        ("about: " + "[" * 5000 + "]" * 5000, "expected values at most 20 deep"),
        ("about: " + "[" * 30 + "]" * 30, "expected values at most 20 deep"),
        ("about: !!python/object/apply:os.system [touch ran]", "not YAML: could not determine a constructor"),
        ("about: !!python/name:os.system x", "not YAML: could not determine a constructor"),
        ("about: 2024-13-45", "not YAML that can be read: month must be in 1..12"),
        ("epochs: " + "9" * 5000, "not YAML that can be read: Exceeds the limit"),
        ("about: " + "x" * 70_000, "expected a recipe of at most 65536 bytes, got more"),
        ("\n".join(f"key{i}: 1" for i in range(2000)), "recipe .*: .*unknown key 'key0'"),
        ("k" * 60_000 + ": 1", "not YAML: mapping values"),
        ("- 1\n", "expected a mapping of keys to values, got list"),
    ],
    ids=lambda value: value[:30],
)
def test_a_recipe_of_bad_will(tmp_path, text, message):
    """A malicious recipe is refused in one short line; no code of it runs, and nothing large is allocated."""
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(TrainingError, match=message) as refused:
        load_recipe(str(own))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 5000
    assert list(tmp_path.iterdir()) == [own]


def test_aliases_of_a_modest_recipe_are_fine(tmp_path):
    own = tmp_path / "own.yaml"
    text = load_recipe("digits-s").to_yaml()
    own.write_text(
        "about: &same ours\n" + text.replace("name: digits-s", "name: *same").replace("about: scikit", "#")
    )
    assert load_recipe(str(own)).name == "ours"


@pytest.mark.parametrize(
    "change",
    [
        "epochs=1000000000000",
        "batch_size=1000000000039",
        "micro_batch=1000000000038",
        "evaluation.batch_size=1000000000000",
        "model.rank=1000000000000",
        "model.image_size=1000000000000",
        "model.kernel_sizes=[1000000000000]",
        "data.workers=1000000000",
        "data.pad=1000000000",
        "data.size=1000000000",
        "data.resize=1000000000",
        "data.classes=1000000000000",
        "data.shuffle=1000000000000",
        "data.randaugment={n: 1000000000000}",
        "log.maps=1000000000",
        "devices=1000000000",
        "log.every=1000000000000",
        f"model.out_channels={[1] * 257}",
        "loss.matrix_classes=1000000000000",
    ],
)
def test_numbers_that_nobody_can_mean(change):
    """Absurd numbers are refused with the name of their key, before anything is allocated."""
    key, _, value = change.partition("=")
    with pytest.raises(TrainingError, match=f"{key.partition('[')[0]}.*: expected "):
        load_recipe("imagenet100-l", [change])
