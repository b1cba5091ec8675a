"""The HTML report: the content of the page, and that a browser shows it."""

import base64
import html.parser
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import coda_fast
from coda_fast import create_model, report
from coda_fast.cli import cli

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


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
    """The images of a page by caption, its text, and the files that it would load."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.words, self.loads, self.open = [], [], [], []
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
            data = base64.b64decode(attributes["src"].split(",")[1])
            self.pictures.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(data)))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_page(model):
    """The page has every map of the model's own explanation on its scale, and the errors of all classes. It
    loads nothing from other servers, and names are escaped.
    """
    images = [torch.rand(1, 8, 8), torch.rand(1, 10, 12)]
    page = Page(report.render(model, images, ["a <i>.png", "b.png"], classes=2, methods=[]))
    assert page.loads == []
    text = " ".join(page.words)
    assert "a <i>.png: " in text
    pictures = dict(page.pictures[:5])
    assert len(page.pictures) == 2 * (1 + 2 + 2)
    explained = model.explain(images[0][None], model(images[0][None]).topk(2).indices)
    scale = np.percentile(explained.contribution_map.abs().numpy(), 99.5)
    for k in range(2):
        name = model.class_names[int(explained.target[0, k])]
        shown = pictures[f"why {name}" if k == 0 else f"why {name}?"]
        assert shown.shape == (8, 8, 3)
        strength = (explained.contribution_map[0, k].numpy() / scale).clip(-1, 1)
        # in bwr, what red or blue lack from white is the contribution
        red, blue = shown[..., 0].astype(int), shown[..., 2].astype(int)
        np.testing.assert_allclose(np.where(strength > 0, 255 - blue, red - 255) / 255, strength, atol=0.02)
    assert f"{float(explained.completeness_error[0, 0]):.1e}" in text


@pytest.mark.parametrize(
    ("logit", "heading", "column"),
    [(10, "(p > 0.999)", "> 0.999"), (0, "(p = 0.5", "0.5"), (-10, "(p < 0.001)", "< 0.001")],
)
def test_probability(logit, heading, column):
    """A confident image is not shown with a probability of 1, nor as "p = p > 0.999"."""
    model = create_model("coda_xs_digits", logit_bias=logit, temperature=1e4).eval()
    page = Page(report.render(model, [torch.rand(1, 8, 8)], ["a"], methods=[]))
    headings = [word for word in page.words if "(p" in word]
    assert len(headings) == 2  # one for the image, and one for its layers
    assert all(heading in h and h.count("p ") == 1 for h in headings), headings
    start = page.words.index("completeness error")
    cells = [word for word in page.words[start + 1 :] if word][1:12:4]
    assert len(cells) == 3
    assert all(cell.startswith(column) for cell in cells), cells


def captions(page):
    """The captions of the maps of the other methods."""
    return [
        caption
        for caption, _ in page.pictures
        if not caption.startswith(("why ", "layer ")) and not caption.endswith(" pixels")
    ]


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
    pictures = dict(page.pictures)
    for title in shown:
        for method in title.split(" = "):
            alone = Page(report.render(model, [image], ["a"], methods=[method]))
            np.testing.assert_allclose(
                dict(alone.pictures)[method].astype(int), pictures[title].astype(int), atol=1
            )


def test_layers(model):
    """The input of each layer after the first, at the size of the layer."""
    page = Page(report.render(model, [torch.rand(1, 8, 8)], ["a"]))
    sizes = {caption: picture.shape[:2] for caption, picture in page.pictures if caption.startswith("layer")}
    assert sizes == {"layer 2, 8 x 8": (8, 8), "layer 3, 4 x 4": (4, 4)}


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
    assert f"2 images, 1 that could not be read -> {output}" in done.output
    text = " ".join(Page(output.read_text()).words)
    assert text.index("a.png: ") < text.index("b.png: ")
    assert "c.png: not an image that Pillow can read" in text


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
    assert done.output.endswith(f"40 images -> {output}\n")
    assert "Folders hold" not in done.output
    titles = lambda: re.findall("<h2>(.*?):", output.read_text())
    assert titles() == [f"val/class_{c}/{i}.png" for c in range(4) for i in range(10)]
    done = invoke(root / "class_3" / "9.png", root, "--limit", 8, *common)
    note = "Folders hold 40 image files: 8 of them are taken, evenly; --limit sets how many."
    assert note in done.output
    assert f"9 images -> {output}" in done.output
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
    assert "50 images ->" in done.output


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


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt install chromium)")
def test_in_a_browser(model, tmp_path):
    """Headless Chromium lays out the page and draws its images in their colours."""
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    report.write(path, report.render(model, [torch.rand(1, 8, 8)], ["a.png"]))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    command = [
        BROWSER,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,900",
        f"--screenshot={shot}",
        path.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (900, 1200)
    saturated = lambda channel: (
        (pixels[..., channel] > 200) & (pixels.sum(2) - pixels[..., channel] < 120)
    ).mean()
    assert saturated(0) > 0.0005  # red, for the class; the legend alone has 0.0004
    assert saturated(2) > 0.0005  # blue, against the class
    assert (pixels.min(2) > 250).mean() > 0.5  # a white page, not an error page in grey
