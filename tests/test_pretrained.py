"""The networks that the package contains: their files, checksums, cards and numbers, and every way to load
them.
"""

import json
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

import coda_fast
from coda_fast import demo, pretrained
from coda_fast.data.photographs import example_photographs
from coda_fast.evaluation import completeness_error
from experiments import pretrained as measured
from experiments.pretrained import rows

NAMES = pretrained.names()
PHOTOGRAPHS = {photograph.path.name: photograph.path for photograph in example_photographs()}


def _model(name):
    return coda_fast.create_model(name, pretrained=True).eval()


def test_names():
    assert NAMES == ("coda_xs_cifar10", "coda_xs_digits", "coda_xs_imagenette")
    listed = coda_fast.list_models(pretrained=True)
    assert tuple(sorted(listed)) == NAMES
    assert set(listed.values()) == {"coda_fast"}
    assert set(listed) < set(coda_fast.list_models())


def test_files_are_small():
    assert sum((pretrained.FOLDER / f"{name}.safetensors").stat().st_size for name in NAMES) < 8e6


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum of coreutils")
def test_sums_are_those_of_sha256sum():
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", pretrained.SUMS.name], cwd=pretrained.FOLDER, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_network(name):
    """The network that a name stands for, in float32, with names of its classes, from every entry point."""
    model = _model(name)
    fresh = coda_fast.create_model(name, device="meta")
    assert {k: t.shape for k, t in model.state_dict().items()} == {
        k: t.shape for k, t in fresh.state_dict().items()
    }
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.transform.config() == fresh.transform.config()
    assert (model.temperature, model.image_size) == (fresh.temperature, fresh.image_size)
    assert len(set(model.class_names)) == model.num_classes == 10
    image = torch.rand(2, model.image_channels, model.image_size, model.image_size)
    expected = model(image)
    assert torch.equal(pretrained.load(name).eval()(image), expected)
    half = coda_fast.create_model(name, pretrained=True, dtype=torch.float16)
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("picture", sorted(PHOTOGRAPHS))
def test_logits(name, picture):
    """The logits are those that were stored, from float64 and the definition, when the weights were shipped.
    Explanations are complete.
    """
    stored = json.loads(rows(name).read_text(encoding="utf-8"))["logits"][picture]
    model = _model(name)
    image = model.transform(PHOTOGRAPHS[picture])[None]
    with torch.no_grad():
        found = model(image)[0]
    torch.testing.assert_close(found, torch.tensor(stored), rtol=0, atol=1e-3)
    assert float(completeness_error(model, image, found.argmax()[None])) < 1e-6


def test_accuracy_on_digits():
    """The digits that the network was not trained on are stored in scikit-learn."""
    data, model = demo.digits(), _model("coda_xs_digits")
    with torch.no_grad():
        accuracy = float((model(data.test_images).argmax(1) == data.test_labels).double().mean())
    stored = json.loads(rows("coda_xs_digits").read_text(encoding="utf-8"))["demo"]["results"][-1]
    assert accuracy == pytest.approx(
        stored["accuracy"], abs=0.0045
    )  # weights are in half precision: 2 of 450


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [("coda_xs_cifar10", "chelsea.png", "cat"), ("coda_xs_imagenette", "china.jpg", "church")],
)
def test_accuracy_on_photographs(name, picture, expected):
    """The photographs of classes that the network knows, at several sizes of the crop, and mirrored. No
    images of CIFAR-10 or Imagenette are stored here, because their licences do not say that one may.
    """
    model = _model(name)
    photograph = Image.open(PHOTOGRAPHS[picture]).convert("RGB")
    side = min(photograph.size)
    crops = [transforms.center_crop(photograph, round(side * part)) for part in (1, 0.95, 0.9, 0.85)]
    crops += [transforms.hflip(crop) for crop in crops]
    with torch.no_grad():
        found = model(torch.stack([model.transform(crop) for crop in crops])).argmax(1)
    assert [model.class_names[index] for index in found] == [expected] * 8


def test_new_classes():
    """Another number of classes: a new last layer, all others as stored."""
    model = coda_fast.create_model("coda_xs_cifar10", pretrained=True, num_classes=3)
    stored = _model("coda_xs_cifar10").state_dict()
    last = f"{model.classifier}."
    for key, tensor in model.state_dict().items():
        assert key.startswith(last) != torch.equal(tensor, stored[key]) if key in stored else False
    assert model.num_classes == 3
    assert model.class_names is None


def test_other_arguments():
    hot = coda_fast.create_model("coda_xs_digits", pretrained=True, temperature=20.0)
    assert hot.temperature == 20
    with pytest.raises(TypeError, match="CoDANet: expected arguments that it takes, got .'in_channels'."):
        coda_fast.create_model("coda_xs_digits", pretrained=True, in_channels=1)
    with pytest.raises(ValueError, match="rank: expected none beside pretrained weights"):
        coda_fast.create_model("coda_xs_digits", pretrained=True, rank=4)
    with pytest.raises(
        ValueError, match="pretrained: expected one of coda_xs_cifar10, .*, got 'coda_s_cifar10'"
    ):
        coda_fast.create_model("coda_s_cifar10", pretrained=True)
    with pytest.raises(
        FileNotFoundError, match=r"nothing: no such checkpoint, and no network of the package \(coda_xs_ci"
    ):
        pretrained.load("nothing")


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_checksum(damage, tmp_path, monkeypatch):
    """A file that is not the one that was shipped is refused, although it could be read."""
    folder = shutil.copytree(pretrained.FOLDER, tmp_path / "weights")
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    monkeypatch.setattr(pretrained, "SUMS", folder / "SHA256SUMS")
    file = folder / "coda_xs_digits.safetensors"
    if damage == "bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        coda_fast.load(file)
    else:
        file.unlink()
    with pytest.raises(coda_fast.CheckpointError, match="coda_xs_digits.safetensors: expected the file that"):
        coda_fast.create_model("coda_xs_digits", pretrained=True)
    _model("coda_xs_cifar10")


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((8, 8), "coda_xs_digits"),
        ((32, 32), "coda_xs_cifar10"),
        ((48, 900), "coda_xs_cifar10"),
        ((49, 49), "coda_xs_imagenette"),
        ((3000, 4000), "coda_xs_imagenette"),
    ],
)
def test_for_picture(size, name):
    assert pretrained.for_picture(*size) == name


@pytest.mark.parametrize("name", NAMES)
def test_card(name):
    card = pretrained.card(name)
    assert card.startswith(f"# {name}\n")
    for part in ("## Data", "## Intended use", "## Licence"):
        assert part in card


# -- the measurements of the cards


def evaluation(folder, metric, images, methods, lines):
    """A folder as ``coda-fast evaluate`` writes it."""
    folder.mkdir()
    stored = {
        "settings": {"metric": metric},
        "accuracy": {"top1": 0.5, "images": images},
        "completeness_error": {"worst": 1e-7, "images": 4},
        "methods": {name: {"settings": settings} for name, settings in methods.items()},
    }
    (folder / "results.json").write_text(json.dumps(stored))
    (folder / "results.csv").write_text("\n".join(lines))
    return folder


def test_collect(tmp_path, monkeypatch):
    """Of each method the evaluation with the most grids counts; a grid is one value of the standard error.
    Methods are compared with the network's own maps on the same grids.
    """
    monkeypatch.setattr(measured, "ROWS", tmp_path)
    monkeypatch.setattr(measured, "DOCS", tmp_path)
    (tmp_path / "pretrained_net_small.json").write_text(json.dumps({"name": "net_small"}))
    header = "method,grid,cell,image,class,score"
    grids = [[0.1, 0.3], [0.5, 0.9], [0.2, 0.4]]

    def lines(method, scores):
        return [
            f"{method},{g},{cell},{2 * g + cell},{cell},{score}"
            for g, cells in enumerate(scores)
            for cell, score in enumerate(cells)
        ]

    localised = [
        ({"Ours": {}}, [header, *lines("Ours", grids)]),
        ({"Ours": {}}, [header, *lines("Ours", grids[:1])]),
        ({"Occ5": {"size": 9}}, [header, *lines("Occ5", [[0.1, 0.1], [0.1, 0.5]])]),
    ]
    folders = [
        evaluation(tmp_path / str(i), "localisation", 10, *content) for i, content in enumerate(localised)
    ]
    curves = ["method,image,0,0.125,0.25", "Ours,0,1,0.5,0.5", "Ours,1,0.5,0.5,0.5"]
    folders.append(evaluation(tmp_path / "removal", "removal", 10, {"Ours": {}}, curves))
    folders += [evaluation(tmp_path / f"accuracy_{n}", "accuracy", n, {}, []) for n in (4, 10)]
    measured.collect("net_small", folders[::-1])
    found = json.loads((tmp_path / "pretrained_net_small.json").read_text())
    assert set(found["localisation"]) == {"Ours", "Occ9"}  # named after the window
    row = found["localisation"]["Ours"]
    assert row["grids"] == 3
    assert row["mean"] == pytest.approx(0.4)
    # the grids' means are 0.2, 0.7 and 0.3: variance (0.04 + 0.09 + 0.01) / 2 = 0.07
    assert row["standard_error"] == pytest.approx((0.07 / 3) ** 0.5)
    # on the first two grids: 0.2 - 0.1 and 0.7 - 0.3
    lead = found["localisation"]["Occ9"]["lead_of_ours"]
    assert lead["mean"] == pytest.approx(0.25)
    assert lead["standard_error"] == pytest.approx(0.15)
    # the areas are (0.75 + 0.5) / 2 and 0.5: their variance is 2 * 0.0625^2
    area = found["removal"]["Ours"]
    assert area["mean"] == pytest.approx(0.5625)
    assert area["standard_error"] == pytest.approx(0.0625)
    assert (found["accuracy"]["images"], found["accuracy_of_first"]["images"]) == (10, 4)
    for metric in ("localisation", "removal"):
        assert (tmp_path / f"{metric}-small.png").stat().st_size > 5000


def test_collect_compares_the_same_grids(tmp_path, monkeypatch):
    """A method that was measured on other images has nothing to be compared with."""
    monkeypatch.setattr(measured, "ROWS", tmp_path)
    (tmp_path / "pretrained_net_small.json").write_text("{}")
    header = "method,grid,cell,image,class,score"
    ours, other = (
        evaluation(
            tmp_path / name,
            "localisation",
            10,
            {name: {}},
            [header, *(f"{name},{grid},0,{first + grid},0,0.5" for grid in range(2))],
        )
        for name, first in (("Ours", 7), ("IxG", 8))
    )
    with pytest.raises(ValueError, match="expected an evaluation of the same 2 grids or images, got none"):
        measured.collect("net_small", [ours, other])
