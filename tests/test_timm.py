"""timm's factory, data pipeline, checkpoints and training loop on CoDA-Nets, which equal the networks of
coda_fast with timm's interface.
"""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.data
import timm.loss
import timm.models
import timm.optim
import timm.utils
import torch
from PIL import Image
from torch import nn

import coda_fast
from coda_fast import timm_models
from coda_fast.losses import matrix_penalty

TINY = dict(rank=4)  # the layers of coda_s_cifar10 with a small rank


def _images(model, batch=2, size=None):
    channels, height, width = model.pretrained_cfg["input_size"]
    return torch.rand(batch, model.in_chans, *(size or (height, width)), dtype=next(model.parameters()).dtype)


def test_every_model_is_registered_with_a_configuration_that_fits():
    assert set(timm.list_models("coda_*")) == set(coda_fast.list_models())
    for name in coda_fast.list_models():
        model = timm.create_model(name, device="meta")
        cfg, tensors = model.pretrained_cfg, model.state_dict()
        assert {key: tuple(t.shape) for key, t in tensors.items()} == {
            key: tuple(t.shape) for key, t in coda_fast.create_model(name, device="meta").state_dict().items()
        }
        assert f"{cfg['first_conv']}.weight" in tensors
        assert tensors[f"{cfg['classifier']}.weight"].shape[0] == model.num_classes == cfg["num_classes"]
        features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
        assert features.shape == (1, model.num_features, *cfg["pool_size"])


@pytest.mark.parametrize(("name", "options"), [("coda_xs_digits", {}), ("coda_s_cifar10", TINY)])
def test_same_weights_give_the_same_logits(name, options):
    model, plain = timm.create_model(name, **options), coda_fast.create_model(name, **options)
    plain.load_state_dict(model.state_dict())
    images = _images(model)
    logits = plain(images)
    features = model.forward_features(images)
    assert torch.equal(model(images), logits)
    assert torch.equal(model.forward_head(features), logits)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.sum((2, 3)))
    assert torch.equal(
        model(images), model.get_classifier()(features).sum((2, 3)) / model.temperature + model.logit_bias
    )


def test_any_size_layout_and_compilation():
    model = timm.create_model("coda_xs_mnist")
    for size in ((28, 28), (17, 40)):
        assert model(_images(model, size=size)).shape == (2, 10)
    images = _images(model)
    logits = model(images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), logits, rtol=1e-6)
    last = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, logits, rtol=1e-5, atol=1e-6)


def test_images_reach_the_network_as_pixels_in_0_1():
    """By default timm would subtract ImageNet's mean, but a CoDA-Net encodes [x, 1 - x]."""
    for name, mode in (("coda_s_cifar10", "RGB"), ("coda_xs_digits", "L")):
        model = timm.create_model(name, device="meta")
        channels, height, width = model.pretrained_cfg["input_size"]
        pixels = torch.randint(0, 256, (height, width, channels), dtype=torch.uint8)
        image = Image.fromarray(pixels.squeeze(-1).numpy())
        assert image.mode == mode
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        assert torch.allclose(transform(image), pixels.permute(2, 0, 1) / 255, atol=1e-6)


def test_the_configuration_and_the_transform_say_the_same(tmp_path):
    """The options of a model are in its configuration, and the model's transform follows a configuration."""
    from coda_fast.data import Preprocessing

    names = [f"digit {i}" for i in range(10)]
    model = timm.create_model(
        "coda_xs_digits", preprocessing=dict(resize=12, crop=10, interpolation="bicubic"), class_names=names
    )
    assert model.transform == Preprocessing(1, 12, 10, "bicubic")
    cfg = timm.data.resolve_data_config({}, model=model)
    image = Image.fromarray(torch.randint(0, 256, (30, 20), dtype=torch.uint8).numpy())
    assert torch.equal(timm.data.create_transform(**cfg)(image), model.transform(image))
    timm.models.save_for_hf(model, tmp_path / "net", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert (again.transform, again.class_names, model.pretrained_cfg["label_names"]) == (
        model.transform,
        names,
        names,
    )
    assert (
        timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=3).class_names is None
    )
    with pytest.raises(ValueError, match="class_names: expected 10 names, one for each class, got 2"):
        timm.create_model("coda_xs_digits", class_names=["a", "b"])
    large = timm.create_model("coda_l_imagenet100", device="meta")
    assert (large.pretrained_cfg["input_size"], large.transform) == (
        (3, 240, 240),
        Preprocessing(3, 256, 240),
    )
    assert timm.create_model("coda_s_cifar10", image_size=64).pretrained_cfg["input_size"] == (3, 64, 64)
    overlay = dict(crop_pct=None, interpolation=None)
    assert timm.create_model("coda_s_cifar10", pretrained_cfg_overlay=overlay).transform.crop == 32


def test_grey_networks_and_other_classes():
    model = timm.create_model("coda_s_cifar10", num_classes=100, in_chans=1, temperature=50.0, **TINY)
    assert model.layers[0].in_channels == 2
    assert model.temperature == 50.0
    assert model.num_classes == model.get_classifier().out_channels == 100
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 100)
    assert (
        timm.create_model("coda_xs_digits", num_classes=1, drop_path_rate=None, bn_eps=None).num_classes == 1
    )
    for unknown in (dict(drop_path_rate=0.1), dict(image_channels=1)):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            timm.create_model("coda_xs_digits", **unknown)


def test_reset_classifier():
    model = timm.create_model("coda_xs_digits", class_names=list("abcdefghij")).double().eval()
    images = _images(model)
    features, before = model.forward_features(images), model.get_classifier()
    model.reset_classifier(7)
    after = model.get_classifier()
    assert model(images).shape == (2, 7)
    assert after.out_channels == 7
    assert model.class_names is None
    assert after.weight.dtype == torch.float64
    assert (after.rank, after.kernel_size, after.padding) == (before.rank, before.kernel_size, before.padding)
    assert torch.equal(model.forward_features(images), features)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), features.sum((2, 3)))
    model.reset_classifier(0, "avg")
    assert torch.allclose(model(images), features.mean((2, 3)), rtol=1e-12)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    for refused in (lambda: model.explain(images), model.config):
        with pytest.raises(ValueError, match="expected a network with a classifier"):
            refused()
    model.reset_classifier(3)  # a classifier with sum pooling
    assert model.global_pool == "sum"
    assert model.explain(images).completeness_error.max() < 1e-12
    made = timm.create_model("coda_xs_digits", num_classes=0, global_pool="")
    assert made(_images(made)).shape == (2, 16, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes: expected an int of at least 0, got -1"),
        ((2.0,), "num_classes: expected an int of at least 0, got 2.0"),
        ((3, "avg"), "global_pool: expected \"sum\" with a classifier .*, got 'avg'"),
        ((0, "max"), "global_pool: expected one of 'sum', 'avg', '', got 'max'"),
    ],
)
def test_reset_classifier_refuses(arguments, message):
    model = timm.create_model("coda_xs_digits")
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(*arguments)
    assert model.num_classes == 10


@pytest.mark.parametrize("indices", [None, (0, 2), (1,)])
def test_features_only(indices):
    """Maps have the stated channels and reductions, and equal those that hooks see in the whole network with
    the same weights.
    """
    options = {} if indices is None else {"out_indices": indices}
    extractor = timm.create_model("coda_s_cifar10", features_only=True, **TINY, **options)
    whole = timm.create_model("coda_s_cifar10", **TINY)
    whole.load_state_dict(
        {k.removeprefix("model."): v for k, v in extractor.state_dict().items()}, strict=False
    )
    chosen = indices or (0, 1, 2)
    # the layers before each stride, and the last layer
    ends = [{0: "layers.1", 1: "layers.4", 2: "layers.7"}[i] for i in chosen]
    assert extractor.feature_info.module_name() == ends
    seen = {}
    for name in ends:
        whole.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    images = torch.rand(2, 3, 32, 40)
    whole(images)
    maps = extractor(images)
    assert len(maps) == len(ends)
    for found, name, channels, reduction in zip(
        maps, ends, extractor.feature_info.channels(), extractor.feature_info.reduction(), strict=True
    ):
        assert torch.equal(found, seen[name])
        assert found.shape == (2, channels, 32 // reduction, 40 // reduction)
    sum(found.sum() for found in maps).backward()
    assert all(p.grad is not None for p in extractor.parameters()), "layers that no map needs are removed"


def test_intermediates():
    model = timm.create_model("coda_s_cifar10", **TINY)
    images = _images(model)
    final, found = model.forward_intermediates(images, indices=2)
    assert torch.equal(final, model.forward_features(images))
    assert [f.shape[1] for f in found] == [32, 64]
    early, (only,) = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert torch.equal(early, only)
    with pytest.raises(ValueError, match="output_fmt: expected \"NCHW\", got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")
    assert model.prune_intermediate_layers([1]) == [1]
    assert model(images).shape == (2, 32, 16, 16)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize("train", [False, True])
def test_explanations_are_complete(train):
    """Explanations of a network with other classes and channels, and, in training mode, of the features that
    dropout left.
    """
    model = (
        timm.create_model(
            "coda_s_cifar10", num_classes=12, in_chans=1, drop_rate=0.5, temperature=5.0, **TINY
        )
        .double()
        .train(train)
    )
    images = _images(model)
    e = model.explain(images, target=[[3, 11]] * 2)
    assert torch.allclose(
        e.contributions.sum((2, 3, 4)), e.logits[:, [3, 11]] - model.logit_bias, rtol=1e-10, atol=1e-13
    )
    assert torch.equal(e.logits, model(images)) is not train
    if not train:
        assert torch.isfinite(matrix_penalty(model, images, torch.tensor([[3], [4]])))


def test_gradient_checkpointing():
    """Gradients and explanations are the same when every layer is computed twice."""
    model = timm.create_model("coda_xs_digits").double()
    images, calls, gradients = _images(model), [], []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        calls.clear()
        gradients.append(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))
        assert len(calls) == 3 * (1 + enable)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    assert model.explain(images).completeness_error.max() < 1e-12


def test_learning_rates_by_layer():
    model = timm.create_model("coda_xs_digits")
    optimizer = timm.optim.create_optimizer_v2(model, "adam", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for index, layer in enumerate(model.layers):
        assert {scale[id(p)] for p in layer.parameters()} == {0.5 ** (2 - index)}


@pytest.mark.parametrize("safe", [True, False])
def test_local_dir_round_trip(safe, tmp_path):
    model = timm.create_model("coda_s_cifar10", num_classes=6, temperature=20.0, **TINY)
    images = _images(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    name = f"local-dir:{tmp_path}"
    twin = timm.create_model(name, pretrained=True)
    assert twin.config() == model.config()
    assert torch.equal(twin(images), model(images))

    other = timm.create_model(name, pretrained=True, num_classes=9)
    assert other(images).shape == (2, 9)
    assert torch.equal(other.forward_features(images), model.forward_features(images))
    assert not torch.equal(other.get_classifier().reduction_weight, model.get_classifier().reduction_weight)

    extractor = timm.create_model(name, pretrained=True, features_only=True)
    assert torch.equal(extractor(images)[-1], model.forward_features(images))
    bare = timm.create_model(name, pretrained=True, num_classes=0)
    assert torch.equal(bare(images), model.forward_features(images).sum((2, 3)))

    with pytest.raises(ValueError, match="in_chans: expected 3 as in the pretrained weights, got 1"):
        timm.create_model(name, pretrained=True, in_chans=1)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for coda_s_cifar10"):
        timm.create_model("coda_s_cifar10", pretrained=True)


def test_files_of_coda_fast_both_ways(tmp_path):
    path, model = tmp_path / "net.safetensors", timm.create_model("coda_xs_digits", num_classes=4)
    images = _images(model)
    coda_fast.save(model, path)
    assert torch.equal(coda_fast.load(path)(images), model(images))
    for options in (
        dict(checkpoint_path=path),
        dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=4)),
    ):
        assert torch.equal(
            timm.create_model("coda_xs_digits", num_classes=4, **options)(images), model(images)
        )


@pytest.fixture
def image_folder(tmp_path):
    """Two classes for training and validation, which differ in the half that is bright."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for label in ("left", "right"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = torch.randint(0, 100, (8, 8), dtype=torch.uint8, generator=generator)
                pixels[:, slice(0, 4) if label == "left" else slice(4, 8)] += 150
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_training_with_the_parts_of_timm(image_folder, tmp_path):
    """The steps of train.py: --device-modules imports the plug-in, followed by timm's factory, loaders,
    mixup, loss, optimiser, EMA and checkpoints.
    """
    importlib.import_module("coda_fast.timm_models")
    model = timm.create_model(
        "coda_xs_digits", num_classes=2, drop_rate=0.0, drop_path_rate=None, global_pool=None
    )
    config = timm.data.resolve_data_config({}, model=model)
    loaders = [
        timm.data.create_loader(
            timm.data.create_dataset("", root=image_folder, split=split, input_img_mode="L"),
            config["input_size"],
            batch_size=8,
            is_training=split == "train",
            no_aug=True,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            num_workers=0,
            device=torch.device("cpu"),
            use_prefetcher=False,
        )
        for split in ("train", "validation")
    ]
    mixup, loss_fn = timm.data.Mixup(mixup_alpha=0.1, num_classes=2), timm.loss.BinaryCrossEntropy()
    optimizer = timm.optim.create_optimizer_v2(model, "adam", lr=0.01, weight_decay=0)
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    for epoch in range(8):
        model.train()
        for images, labels in loaders[0]:
            images, labels = mixup(images, labels)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
        model.eval()
        with torch.no_grad():
            hits = [timm.utils.accuracy(model(images), labels)[0].item() for images, labels in loaders[1]]
        saver.save_checkpoint(epoch, metric=sum(hits) / len(hits))
    assert saver.best_metric == 100.0
    last, images = tmp_path / "last.pth.tar", next(iter(loaders[1]))[0]
    # timm prefers the averaged weights
    twin = timm.create_model("coda_xs_digits", num_classes=2, checkpoint_path=last).eval()
    assert torch.equal(twin(images), ema.module.eval()(images))
    timm.models.load_checkpoint(twin, last, use_ema=False)
    assert torch.equal(twin(images), model(images))


def test_train_py(image_folder, tmp_path):
    """timm's own script, which is not in its wheel and is found by TIMM_TRAIN, trains, validates, saves and
    resumes.
    """
    script = os.environ.get("TIMM_TRAIN")
    if not script:
        pytest.skip(
            "TIMM_TRAIN=.../pytorch-image-models/train.py runs timm's own script, which its wheel does not "
            "hold"
        )
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), str(root / "kernels")])
    output = tmp_path / "run"

    def train(*more, plugin=("--device-modules", "coda_fast.timm_models")):
        flags = {
            "model": "coda_xs_digits",
            "num-classes": 2,
            "in-chans": 1,
            "input-img-mode": "L",
            "model-kwargs": "rank=4",
            "loss": "bce",
            "opt": "adam",
            "lr": 0.01,
            "warmup-epochs": 0,
            "batch-size": 2,
            "workers": 0,
            "device": "cpu",
            "amp-dtype": "bfloat16",
            "model-ema-decay": 0.8,
            "data-dir": image_folder,
            "output": tmp_path,
            "experiment": output.name,
        }
        words = [*plugin, *more, *(word for name, value in flags.items() for word in (f"--{name}", value))]
        command = [sys.executable, script, "--no-aug", "--amp", "--model-ema", *map(str, words)]
        return subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )

    def rows():
        with open(output / "summary.csv", newline="") as file:
            return list(csv.DictReader(file))

    done = train("--epochs", 1, plugin=())
    assert done.returncode != 0
    assert "Unknown model (coda_xs_digits)" in done.stderr
    done = train("--epochs", 1, "--no-prefetcher")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows()
    assert float(row["eval_top1"]) == 100.0

    last = output / "last.pth.tar"
    # the averaged weights
    twin = timm.create_model("coda_xs_digits", num_classes=2, rank=4, checkpoint_path=last).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=twin))
    data = timm.data.create_dataset(
        "", root=image_folder, split="validation", input_img_mode="L", transform=transform
    )
    images, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    # the script uses bfloat16
    assert nn.functional.cross_entropy(twin(images), labels).item() == pytest.approx(
        float(row["eval_loss"]), rel=0.02
    )
    averaged = twin(images)
    timm.models.load_checkpoint(twin, last, use_ema=False)
    assert not torch.equal(twin(images), averaged)
    assert torch.equal(twin(images).argmax(1), labels)

    done = train("--epochs", 2, "--resume", last)
    assert done.returncode == 0, done.stdout + done.stderr
    assert timm.utils.load_checkpoint_metadata(last)["epoch"] == 1
    assert rows()[-1]["epoch"] == "1"
    assert float(rows()[-1]["eval_loss"]) < float(row["eval_loss"])


def test_without_timm():
    code = "import sys; sys.modules['timm'] = None; import coda_fast; import coda_fast.timm_models"
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "ImportError: coda_fast.timm_models needs timm: pip install 'coda-fast[timm]'" in done.stderr


def test_the_entry_points_are_public():
    assert set(coda_fast.list_models()) < set(timm_models.__all__)
    assert timm_models.coda_xs_digits().num_classes == 10


def test_options_of_a_classifier_come_back():
    """A reset classifier has the geometry of the previous one, including its dilation."""
    model = timm_models.TimmCoDANet(
        [4, 3], [2, 2], [3, 3], [1, 1], dilations=[1, 2], norm=["squash", "l2"], temperature=1.0
    )
    model.reset_classifier(5)
    assert (
        model.config() | {"out_channels": [4, 3]}
        == timm_models.TimmCoDANet(
            [4, 3], [2, 2], [3, 3], [1, 1], dilations=[1, 2], norm=["squash", "l2"], temperature=1.0
        ).config()
    )
    assert model(torch.rand(1, 3, 9, 9)).shape == (1, 5)
