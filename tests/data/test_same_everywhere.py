"""A network sees the same pixels in training, evaluation, a plain loop, timm and an exported file, for images
as users have them.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from odd_pictures import UPRIGHT, file_of, odd_files, turned
from PIL import Image

import coda_fast
from coda_fast import train
from coda_fast.cli import cli
from coda_fast.data import ImageError, Preprocessing
from coda_fast.train.recipes import load_recipe

pytest.importorskip("lightning", reason="pip install 'coda-fast[train]'")
NET = (
    "model.name=coda_s_cifar10",
    "model.ranks=[4, 4]",
    "model.kernel_sizes=[3, 3]",
    "model.strides=[2, 1]",
    "model.temperature=20",
    "data.kind=folder",
    "data.resize=20",
    "data.size=16",
    "data.workers=0",
    "batch_size=8",
    "log.maps=0",
    "log.tensorboard=false",
    "accelerator=cpu",
    "schedule.kind=constant",
)
CLASSES = ("ant", "bee", "cat")


def trained(folder, output, *overrides, classes=3):
    recipe = load_recipe(
        "digits-s", [*NET, f"model.out_channels=[4, {classes}]", f"data.path={folder}", *overrides]
    )
    return train.run(recipe, output, progress=False)


def evaluated(checkpoint, data, output, *options):
    """results.json and the rows of results.csv of ``coda-fast evaluate --metric accuracy``."""
    arguments = [
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--data",
        data,
        "--metric",
        "accuracy",
        "--output",
        output,
        *options,
    ]
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    with open(output / "results.csv", newline="") as file:
        return json.loads((output / "results.json").read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained network, its folder of odd images, and the last row of its history."""
    folder = tmp_path_factory.mktemp("odd")
    for split, start in (("train", 0), ("val", 100)):
        for label, name in enumerate(CLASSES):
            for seed in range(2):
                place = folder / split / name / ("deeper" if seed else "")
                place.mkdir(parents=True, exist_ok=True)
                for file, data in odd_files(start + 10 * label + seed).items():
                    (place / file).write_bytes(data)
                    (place / f"._{file}").write_bytes(b"of macOS")
    row = trained(folder, folder / "run", "epochs=3")
    return coda_fast.load(folder / "run" / "model.safetensors").eval(), folder, row


def loop(model, folder):
    """The loop that a user would write: {path: (class, logits)} of the images that can be read."""
    found = {}
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / "val" / name).rglob("[!.]*.*")):
            try:
                image = model.transform(Image.open(path))
            except (ImageError, OSError):
                continue
            with torch.no_grad():
                found[str(path)] = label, model(image[None])[0]
    return found


def test_the_accuracy_of_a_checkpoint_is_one_number(run, tmp_path):
    model, folder, row = run
    each = loop(model, folder)
    readable = len(CLASSES) * 2 * sum(not name.startswith("broken") for name in odd_files())
    right = sum(int(logits.argmax()) == label for label, logits in each.values())
    assert len(each) == row["val_images"] == readable
    assert 0.2 < right / readable < 0.999, "an accuracy of 0 or 1 cannot show a difference"
    assert len({int(logits.argmax()) for _, logits in each.values()}) > 1
    assert row["val_accuracy"] == right / readable
    for workers in (0, 2):
        document, rows = evaluated(
            folder / "run" / "model.safetensors",
            folder / "val",
            tmp_path / str(workers),
            "--workers",
            workers,
        )
        assert document["accuracy"] == {"top1": right / readable, "top5": 1.0, "images": readable}
        assert document["skipped"] == len(CLASSES) * 2 * 2
        assert document["preprocessing"] == {
            "resize": 20,
            "crop": 16,
            "interpolation": "bilinear",
            "value_range": [0.0, 1.0],
        }
        found = {line["picture"]: int(line["predicted"]) for line in rows}
        assert found == {path: int(logits.argmax()) for path, (_, logits) in each.items()}


def test_training_saw_what_the_transform_makes(run):
    """The pixels of every kind of file are compared as the data loader of training returns them."""
    from coda_fast.train.data import open_data

    model, folder, _ = run
    recipe = load_recipe("digits-s", [*NET, f"data.path={folder}"])
    source = open_data(recipe.data, 3).val
    names, images = [], []
    for batch in source.evaluation(7):
        valid = torch.ones(len(batch.labels), dtype=torch.bool) if batch.valid is None else batch.valid
        images.append(batch.images[valid])
    names = [path for path, _ in source.files if "broken" not in path]
    for name, image in zip(names, torch.cat(images), strict=True):
        assert torch.equal(model.transform(name), image / 255), name


# timm leaves closing files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_timm(run, tmp_path):
    """timm's data set with ``model.transform`` sees the same pixels for every image. timm's own pipeline,
    built from the model's configuration, does so for ordinary images.
    """
    pytest.importorskip("timm", reason="pip install 'coda-fast[timm]'")
    import timm.data
    from timm.data.readers import img_extensions
    from timm.utils import AverageMeter, accuracy

    from coda_fast import timm_models

    model, folder, row = run
    # timm names a class after the folder of the file, and stops at damaged files
    for path in (folder / "val").rglob("[!.]*.*"):
        if not path.name.startswith("broken"):
            name = path.relative_to(folder / "val").parts[0]
            (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "val" / name / f"{path.parent.name}_{path.name}")
    net = timm_models.TimmCoDANet(**model.config())
    net.load_state_dict(model.state_dict())
    before = img_extensions.get_img_extensions(as_set=False)
    try:
        img_extensions.add_img_extensions([".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm"])
        data = timm.data.create_dataset(
            "", root=str(tmp_path / "val"), input_img_mode=None, transform=net.transform
        )
    finally:
        img_extensions.set_img_extensions(before)
    meter = AverageMeter()
    for images, labels in torch.utils.data.DataLoader(data, batch_size=16):
        with torch.no_grad():
            meter.update(accuracy(net(images), labels)[0].item(), len(labels))
    assert meter.count == row["val_images"]
    assert meter.avg == pytest.approx(100 * row["val_accuracy"], rel=1e-9)
    cfg = timm_models._data_cfg(net.transform)
    own = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    for name in (
        "plain.jpg",
        "progressive.jpg",
        "large.jpg",
        "cmyk.jpg",
        "grey.jpg",
        "small.ppm",
        "speck.png",
        "one_bit.png",
    ):
        path = folder / "val" / "bee" / name
        assert torch.equal(own(Image.open(path).convert("RGB")), net.transform(path)), name


def test_exported(run, tmp_path):
    """The network in onnxruntime, with the preprocessing that its file describes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, folder, row = run
    coda_fast.export.export_onnx(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    transform = Preprocessing.of(said, said.pop("channels"))
    right = 0
    for path, (label, logits) in loop(model, folder).items():
        (found,) = session.run(None, {"images": transform(path)[None].numpy()})
        assert found[0].argmax() == int(logits.argmax())
        right += int(found[0].argmax()) == label
    assert right / row["val_images"] == row["val_accuracy"]


# -- what was seen to go wrong on folders of people
# -----------------------------------------------------------------------------------


def set_of(root, files):
    """Write root/{train,val}/CLASS/NUMBER.ENDING from {class: [(bytes, ending)]}."""
    for split in ("train", "val"):
        for name, some in files.items():
            (root / split / name).mkdir(parents=True)
            for i, (data, ending) in enumerate(some):
                (root / split / name / f"{i:02d}.{ending}").write_bytes(data)
    return root


def accuracies(root, output, *overrides):
    row = trained(root, output, "epochs=8", "batch_size=8", "optimizer.lr=0.02", *overrides, classes=2)
    document, _ = evaluated(output / "model.safetensors", root / "val", output / "evaluation")
    return row["val_accuracy"], document["accuracy"]["top1"]


def test_pictures_of_one_size_are_of_one_size_in_training_and_validation(tmp_path):
    """If a recipe names no size, validation images of another size would give the network other pixels than
    in training.
    """

    def coloured(side):
        return {
            name: [(file_of(Image.new("RGB", (side, side), name)), "png")] * 8 for name in ("blue", "red")
        }

    root = set_of(tmp_path / "set", coloured(20))
    options = ("data.size=null", "data.resize=null")
    assert accuracies(root, tmp_path / "run", *options) == (1.0, 1.0)
    assert coda_fast.load(tmp_path / "run" / "model.safetensors").transform == Preprocessing(3, 20, 20)
    shutil.rmtree(root / "val")
    shutil.move(set_of(tmp_path / "other", coloured(28)) / "val", root / "val")
    for more in ((), ("data.in_memory=true",)):
        with pytest.raises(train.TrainingError, match=r"images of one size.*28"):
            trained(root, tmp_path / "again", *options, *more, "epochs=1", classes=2)


def test_classes_that_are_told_apart_by_orientation(tmp_path):
    """The network learns classes that differ in their orientation, given by EXIF or by the pixels, and both
    give the same network bit for bit.
    """
    pictures = {"up": UPRIGHT, "down": UPRIGHT[::-1, ::-1]}
    by_exif = {
        name: [(turned(1 + i, "PNG", pixels=p), "png") for i in range(8)] for name, p in pictures.items()
    }
    by_pixels = {
        name: [(file_of(Image.fromarray(np.ascontiguousarray(p))), "png") for _ in range(8)]
        for name, p in pictures.items()
    }
    for name, files in (("exif", by_exif), ("pixels", by_pixels)):
        assert accuracies(set_of(tmp_path / name, files), tmp_path / f"run_{name}", "data.resize=16") == (
            1.0,
            1.0,
        )
    first, second = (
        coda_fast.load(tmp_path / f"run_{name}" / "model.safetensors").state_dict()
        for name in ("exif", "pixels")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_lies_under_transparency_tells_nothing(tmp_path):
    """Two classes that differ only under full transparency are classified by chance, in training and in
    evaluation.
    """

    def clear(colour):
        return (file_of(Image.new("RGBA", (20, 20), (*colour, 0))), "png")

    root = set_of(tmp_path / "set", {"blue": [clear((0, 0, 255))] * 8, "red": [clear((255, 0, 0))] * 8})
    assert accuracies(root, tmp_path / "run") == (0.5, 0.5)


def test_hidden_files_and_folders_in_folders(tmp_path):
    """Hidden files of macOS do not count as corrupt images, and a limit counts images only. Images in
    subfolders are read in training and in evaluation.
    """
    red, blue = ((file_of(Image.new("RGB", (20, 20), colour)), "png") for colour in ("red", "blue"))
    root = set_of(tmp_path / "set", {"blue": [blue] * 8, "red": [red] * 8})
    for path in list(root.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7of macOS")
        deeper = path.parent / "deeper"
        deeper.mkdir(exist_ok=True)
        shutil.copy(path, deeper / path.name)
    row = trained(root, tmp_path / "run", "epochs=1", "batch_size=32", "data.max_corrupt=0", classes=2)
    assert (row["unreadable"], row["val_images"]) == (0, 32)
    document, rows = evaluated(tmp_path / "run" / "model.safetensors", root / "val", tmp_path / "all")
    assert (document["accuracy"]["images"], document["skipped"]) == (32, 0)
    document, rows = evaluated(
        tmp_path / "run" / "model.safetensors", root / "val", tmp_path / "six", "--limit", 6
    )
    assert [int(line["class"]) for line in rows] == [0, 0, 0, 1, 1, 1]


def test_a_run_that_began_by_other_rules_does_not_go_on(tmp_path):
    red, blue = ((file_of(Image.new("RGB", (20, 20), colour)), "png") for colour in ("red", "blue"))
    root = set_of(tmp_path / "set", {"blue": [blue] * 8, "red": [red] * 8})
    recipe = load_recipe("digits-s", [*NET, "model.out_channels=[4, 2]", f"data.path={root}", "epochs=1"])
    train.run(recipe, tmp_path / "run", progress=False)
    (path,) = (tmp_path / "run" / "checkpoints").glob("epoch*.pt")
    state = torch.load(path, weights_only=True)
    # as it was written before
    state["data"] = {key: value for key, value in state["data"].items() if not key.endswith("rules")}
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    torch.save(state, path)
    with pytest.raises(
        train.TrainingError,
        match=r"began with pictures that were decoded by other rules \(version 1, now 2: ",
    ):
        train.run(recipe.model_copy(update={"epochs": 2}), tmp_path / "run", "auto", progress=False)
