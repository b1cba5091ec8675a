"""The HTML report: the content of the page. What a browser makes of it is tested in test_viewer.py."""

import base64
import html.parser
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import coda_fast
from coda_fast import create_model, report
from coda_fast.cli import cli


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        "coda_xs_digits", class_names=[f"digit {i}" for i in range(9)] + ["<b>nine</b>"]
    ).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    coda_fast.save(model, path)
    return path


class Page(html.parser.HTMLParser):
    """The images of a page by caption, its text, the data of its views, and the files that it would load."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.words, self.views, self.loads, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loads += [
            v
            for k, v in attributes.items()
            if k in ("src", "href") and not v.startswith("data:image/png;base64,")
        ]
        if tag == "img":
            assert "noscript" in self.open
            data = base64.b64decode(attributes["src"].split(",")[1])
            self.pictures.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(data)))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if data.startswith("{"):
                self.views.append(json.loads(data))
        else:
            self.words.append(data.strip())


def maps_of(shown):
    """The maps [K, H, W] of a level or a method of a view."""
    maps = np.frombuffer(base64.b64decode(shown["maps"]), "<f4")
    return maps.reshape(-1, shown["height"], shown["width"])


def test_page(model):
    """The page has every map of the model's own explanation, its scale and the errors of all classes; without
    a script, the first map. It loads nothing from other servers, and names are escaped.
    """
    images = [torch.rand(1, 8, 8), torch.rand(1, 10, 12)]
    page = Page(report.render(model, images, ["a <i>.png", "b.png"], classes=2, methods=[]))
    assert page.loads == []
    text = " ".join(page.words)
    assert "a <i>.png: " in text
    assert [view["name"] for view in page.views] == ["a <i>.png", "b.png"]
    assert len(page.pictures) == 2 * 2
    for i, image in enumerate(images):
        explained = model.explain(image[None], model(image[None]).topk(2).indices)
        scale = np.percentile(explained.contribution_map.abs().double().numpy(), 99.5)
        level = page.views[i]["levels"][0]
        assert np.array_equal(maps_of(level), explained.contribution_map[0].numpy())
        assert level["scale"] == pytest.approx(scale)
        assert level["errors"] == explained.completeness_error[0].tolist()
        names = [model.class_names[int(c)] for c in explained.target[0]]
        assert [c["name"] for c in page.views[i]["classes"]][:2] == names
        shown = dict(page.pictures[2 * i : 2 * i + 2])[f"why {names[0]}"]
        assert shown.shape == (*image.shape[1:], 3)
        strength = (explained.contribution_map[0, 0].numpy() / scale).clip(-1, 1)
        # in bwr, what red or blue lack from white is the contribution
        red, blue = shown[..., 0].astype(int), shown[..., 2].astype(int)
        np.testing.assert_allclose(np.where(strength > 0, 255 - blue, red - 255) / 255, strength, atol=0.02)


@pytest.mark.parametrize(
    ("logit", "heading"), [(10, "(p > 0.999)"), (0, "(p = 0.5"), (-10, "fits none of the 10 classes: ")]
)
def test_probability(logit, heading):
    """A confident image is not shown with a probability of 1, nor as "p = p > 0.999"; of an image that fits
    no class, the page says so.
    """
    model = create_model("coda_xs_digits", logit_bias=logit, temperature=1e4).eval()
    page = Page(report.render(model, [torch.rand(1, 8, 8)], ["a"], methods=[]))
    headings = [word for word in page.words if word.startswith("a: ")]
    assert len(headings) == 1
    assert heading in headings[0]
    assert headings[0].count("p ") == 1
    assert headings[0].endswith("has p < 0.001") == (logit == -10)
    found = [c["probability"] for c in page.views[0]["classes"]]
    assert len(found) == 10
    assert found == pytest.approx([1 / (1 + np.exp(-logit))] * 10, rel=0.1)


def captions(page):
    """The names of the maps of the other methods."""
    return [method["label"] for view in page.views for method in view["methods"]]


def test_default_methods(model, monkeypatch):
    """The network's own maps are shown next to those of other methods. If captum is missing, the page says
    so, and requesting its methods is an error.
    """
    render = lambda **options: Page(report.render(model, [torch.rand(1, 8, 8)], ["a"], **options))
    assert captions(render()) == ["IxG", "IntGrad", "GCam"]
    assert captions(render(methods=[])) == captions(render(methods=["Ours"])) == []
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    page = render()
    assert captions(page) == []
    assert (
        "No other methods are shown: the baselines need captum: pip install 'coda-fast[evaluation]'."
        in page.words
    )
    assert not any("No other methods" in word for word in render(methods=[]).words)
    with pytest.raises(ImportError, match="the baselines need captum"):
        render(methods=["IxG"])


@pytest.mark.parametrize(
    ("methods", "shown"),
    [
        (["DeepLIFT", "GCam", "IxG"], ["IxG = DeepLIFT", "GCam"]),
        (["GB", "Ours", "Grad", "DeepLIFT", "GB"], ["Grad = GB", "DeepLIFT"]),
        (["IxG", "GB"], ["IxG", "GB"]),
    ],
)
def test_methods_that_are_the_same(model, methods, shown):
    """One column for both methods, because captum computes the same for both."""
    image = torch.rand(1, 8, 8)
    page = Page(report.render(model, [image], ["a"], methods=methods))
    assert captions(page) == shown
    for found in page.views[0]["methods"]:
        for method in found["label"].split(" = "):
            (alone,) = Page(report.render(model, [image], ["a"], methods=[method])).views[0]["methods"]
            np.testing.assert_allclose(maps_of(alone), maps_of(found), atol=1e-5 * found["scale"])


def test_layers(model):
    """The input of each layer after the first, at the size of the layer."""
    page = Page(report.render(model, [torch.rand(1, 8, 8)], ["a"]))
    sizes = {level["label"]: maps_of(level).shape for level in page.views[0]["levels"]}
    assert sizes == {"image, 8 x 8": (10, 8, 8), "layer 2, 8 x 8": (10, 8, 8), "layer 3, 4 x 4": (10, 4, 4)}


def test_classes_by_default():
    """As many as take a megabyte, so that the page does not become too large."""
    model = create_model("coda_xs_digits", num_classes=30).eval()
    count = lambda side: report.default_classes(model, side, side)
    assert [count(side) for side in (8, 64, 224, 1024)] == [20, 20, 5, 3]
    page = Page(report.render(model, [torch.rand(1, 224, 224), torch.rand(1, 8, 8)], ["a", "b"], methods=[]))
    assert [view["levels"][0]["count"] for view in page.views] == [5, 20]
    assert report.default_classes(create_model("coda_xs_digits", num_classes=2), 8, 8) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(images=[]), "images: expected at least one and a name for each, got 0 images and 1 names"),
        (dict(classes=0), "classes: expected 1 to 10, got 0"),
        (dict(classes=11), "classes: expected 1 to 10, got 11"),
        (dict(images=[torch.rand(3, 8, 8)]), "images: expected [N, 1, H, W]"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        report.render(model, options.pop("images", [torch.rand(1, 8, 8)]), ["a"], **options)


def invoke(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


def test_command(tmp_path, checkpoint):
    """In a folder with a file that is not an image, the others are shown and the file is named."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"nothing")
    output = tmp_path / "new" / "page.html"
    done = invoke(folder, "--checkpoint", checkpoint, "--output", output)
    assert done.exit_code == 0, done.output
    assert f"2 images, 1 that could not be read, explained by {checkpoint.name} -> {output}" in done.output
    text = " ".join(Page(output.read_text()).words)
    assert text.index("a.png: ") < text.index("b.png: ")
    assert "c.png: not an image that Pillow can read" in text


def test_command_chooses_networks(tmp_path):
    """Without --checkpoint, the network is chosen for each picture by its size, and the page names it."""
    for name, side in (("a.png", 32), ("b.png", 300)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    done = invoke(tmp_path, "--output", tmp_path / "page.html", "--methods", "IxG", "--classes", 1)
    assert done.exit_code == 0, done.output
    names = ["coda_xs_cifar10", "coda_xs_imagenette"]
    assert f"2 images, explained by {', '.join(names)} ->" in done.output
    page = Page((tmp_path / "page.html").read_text())
    text = " ".join(page.words)
    for view, name in zip(page.views, names, strict=True):
        model = coda_fast.create_model(name, pretrained=True)
        assert {c["name"] for c in view["classes"]} <= set(model.class_names)
        assert (view["height"], view["verdict"].rpartition(" ")[2]) == (model.image_size, name)
        assert f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, T = 400" in text


def test_networks_with_different_biases(model):
    """The page then leaves the number to the views."""
    other = create_model("coda_xs_digits", logit_bias=-1.0).eval()
    shown = [report.Picture(n, torch.rand(1, 8, 8), network=n) for n in ("first", "second")]
    page = Page("".join(report.stream({"first": model, "second": other}, shown, methods=[])))
    assert "Every logit is the bias plus the sum" in " ".join(page.words)
    assert [view["logit_bias"] for view in page.views] == [model.logit_bias, -1.0]


def test_pictures_are_asked_for_one_by_one(model):
    """A page of any length holds one image in memory at a time. Unreadable images are listed at its end."""
    asked, skipped = [], []

    def pictures():
        for i in range(3):
            asked.append(i)
            yield report.Picture(f"{i}.png", torch.rand(1, 8, 8))
        skipped.append("late.png: nothing")

    found, when = "", {}
    for piece in report.stream(model, pictures(), methods=[], skipped=skipped):
        found += piece
        for i in range(3):
            if f"<h2>{i}.png" in found:
                when.setdefault(i, len(asked))
    assert when == {0: 1, 1: 2, 2: 3}
    assert [word for word in Page(found).words if word][
        -1
    ] == "Not shown, because they could not be read: late.png: nothing."


def test_command_shows_crops(tmp_path, checkpoint):
    """The network sees the middle of a wide picture. The picture and all maps have its shape, and with --size
    all of it is used.
    """
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)).save(
        tmp_path / "wide.png"
    )
    common = (
        tmp_path / "wide.png",
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "page.html",
        "--methods",
        "none",
        "--classes",
        1,
    )
    assert invoke(*common).exit_code == 0
    pictures = Page((tmp_path / "page.html").read_text()).pictures
    assert pictures[0][0] == "what the network saw: 8 x 8 pixels of the middle"
    assert {picture.shape[1] / picture.shape[0] for _, picture in pictures} == {2.0}
    assert invoke(*common, "--size", 8).exit_code == 0
    pictures = Page((tmp_path / "page.html").read_text()).pictures
    assert [caption for caption, _ in pictures[:1]] == ["16 x 8 pixels"]
    assert pictures[1][1].shape == (8, 16, 3)


def images_of_classes(root, classes=4, each=10):
    for c in range(classes):
        (root / f"class_{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.full((8, 8), 20 * c + i, np.uint8)).save(root / f"class_{c}" / f"{i}.png")


def test_command_on_a_folder_of_classes(tmp_path, checkpoint):
    """Images of all depths and classes are shown, up to the limit, which the page states. Files given by name
    do not count.
    """
    root, output = tmp_path / "data" / "val", tmp_path / "page.html"
    images_of_classes(root)
    (root / "class_1" / "again").symlink_to(root, target_is_directory=True)
    (root / ".cache").mkdir()
    for junk in (".cache/0.png", "._0.png", "labels.csv"):
        (root / junk).write_bytes(b"nothing")
    common = ("--checkpoint", checkpoint, "--output", output, "--methods", "none", "--classes", 1)
    done = invoke(root.parent, *common)
    assert done.exit_code == 0, done.output
    assert done.output.endswith(f"40 images, explained by {checkpoint.name} -> {output}\n")
    assert "Folders hold" not in done.output
    titles = lambda: re.findall("<h2>(.*?):", output.read_text())
    assert titles() == [f"val/class_{c}/{i}.png" for c in range(4) for i in range(10)]
    done = invoke(root / "class_3" / "9.png", root, "--limit", 8, *common)
    note = "Folders hold 40 image files: 8 of them are taken, evenly; --limit sets how many."
    assert note in done.output
    assert f"9 images, explained by {checkpoint.name} -> {output}" in done.output
    assert note in Page(output.read_text()).words
    assert titles() == ["9.png"] + [f"class_{c}/{i}.png" for c in range(4) for i in (0, 5)]


def test_limit_by_default(tmp_path, checkpoint):
    images_of_classes(tmp_path / "data", each=13)
    done = invoke(
        tmp_path / "data",
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "page.html",
        "--methods",
        "none",
        "--classes",
        1,
    )
    assert "Folders hold 52 image files: 50 of them are taken" in done.output
    assert "50 images, explained by" in done.output


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ["IxG", "IntGrad", "GCam"]),
        (["--methods", "none"], []),
        (["--methods", "IxG, DeepLIFT"], ["IxG = DeepLIFT"]),
    ],
)
def test_command_methods(tmp_path, checkpoint, arguments, shown):
    images_of_classes(tmp_path / "data", 1, 1)
    done = invoke(
        tmp_path / "data", "--checkpoint", checkpoint, "--output", tmp_path / "page.html", *arguments
    )
    assert done.exit_code == 0, done.output
    assert captions(Page((tmp_path / "page.html").read_text())) == shown


def test_command_refuses(tmp_path, checkpoint):
    (tmp_path / "c.png").write_bytes(b"nothing")
    output = tmp_path / "page.html"
    assert "not an image" in str(
        invoke(tmp_path / "c.png", "--checkpoint", checkpoint, "--output", output).exception
    )
    (tmp_path / "empty").mkdir()
    done = invoke(tmp_path / "empty", "--checkpoint", checkpoint, "--output", output)
    assert "expected at least one image that can be read, got 0 files" in done.output
    assert not output.exists()
