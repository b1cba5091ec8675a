"""The HTML report: what is on the page, and that a browser shows it."""

import base64
import html.parser
import io
import re
import shutil
import subprocess

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
    return create_model("coda_xs_digits", class_names=[f"digit {i}" for i in range(9)] + ["<b>nine</b>"]).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    coda_fast.save(model, path)
    return path


class Page(html.parser.HTMLParser):
    """Pictures by caption, text, and what a page would load."""

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
        self.loads += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:image/png;base64,")]
        if tag == "img":
            data = base64.b64decode(attributes["src"].split(",")[1])
            self.pictures.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(data)))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_page(model):
    """Every map of the model's own explanation, on its scale; all classes' errors; nothing loaded from elsewhere; names escaped."""
    images = [torch.rand(1, 8, 8), torch.rand(1, 10, 12)]
    page = Page(report.render(model, images, ["a <i>.png", "b.png"], classes=2))
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
        red, blue = shown[..., 0].astype(int), shown[..., 2].astype(int)  # bwr: white less what is missing
        np.testing.assert_allclose(np.where(strength > 0, 255 - blue, red - 255) / 255, strength, atol=0.02)
    assert f"{float(explained.completeness_error[0, 0]):.1e}" in text


def test_layers(model):
    """What enters each layer after the first, in the layer's own size."""
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
    """A folder with a file that is no image: the others are shown, it is named."""
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


def test_command_refuses(tmp_path, checkpoint):
    (tmp_path / "c.png").write_bytes(b"nothing")
    output = tmp_path / "page.html"
    assert "not an image" in str(invoke(tmp_path / "c.png", "--checkpoint", checkpoint, "--output", output).exception)
    (tmp_path / "empty").mkdir()
    done = invoke(tmp_path / "empty", "--checkpoint", checkpoint, "--output", output)
    assert "expected at least one image that can be read, got 0 files" in done.output
    assert not output.exists()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt install chromium)")
def test_in_a_browser(model, tmp_path):
    """Headless Chromium: the page is laid out and its pictures are drawn in their colours."""
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    report.write(path, report.render(model, [torch.rand(1, 8, 8)], ["a.png"]))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
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
    saturated = lambda channel: ((pixels[..., channel] > 200) & (pixels.sum(2) - pixels[..., channel] < 120)).mean()  # noqa: E731
    assert saturated(0) > 0.0005  # red: for; the legend alone has 0.0004
    assert saturated(2) > 0.0005  # blue: against
    assert (pixels.min(2) > 250).mean() > 0.5  # a white page, not an error page in grey
