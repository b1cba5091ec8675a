"""The interactive view: what Python describes, and what a browser makes of it. Numbers that a page shows are
compared with those of the network.
"""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from coda_fast import create_model, plot, report, viewer
from coda_fast._classes import fits_no_class
from coda_fast.data import Preprocessing

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SMALL = 1e-6  # of the largest number: float32, of which seven digits are shown
HOSTILE = [
    '<img src=x onerror="window.hurt=1">.png',
    "</script><script>window.hurt=1</script>.png",
    "<!--<script>.png",
    "\"'><b>&lt;.png",
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("coda_xs_digits", class_names=[f"digit {i}" for i in range(10)]).eval()


@pytest.fixture(scope="module")
def picture():
    return report.Picture("a.png", torch.rand(1, 6, 9, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def payload(model, picture):
    return viewer.describe(model, picture, methods=[])


def maps_of(level):
    maps = np.frombuffer(base64.b64decode(level["maps"]), "<f4")
    return maps.reshape(-1, level["height"], level["width"])


def explained(model, picture, **options):
    """The explanation of all classes, in the order of the view."""
    batch = picture.image[None]
    return model.explain(batch, model(batch).topk(model.num_classes).indices, **options)


# -- what Python describes


@pytest.mark.parametrize(
    ("logits", "fits_none", "words"),
    [
        ([-1.0, -3.0, -2.0], True, "fits none of the 3 classes: the most likely, class 0, has p = 0.269"),
        ([-1.0, -3.0, 0.0], False, "class 2 (p = 0.500)"),
        ([-9.0], True, "does not fit the only class, class 0 (p < 0.001)"),
    ],
)
def test_pictures_that_fit_no_class(logits, fits_none, words):
    assert fits_no_class(torch.tensor(logits)) is fits_none
    assert viewer.verdict(torch.tensor(logits)) == words
    with pytest.raises(ValueError, match=re.escape("logits: expected those of one image, [classes], got")):
        fits_no_class(torch.tensor([logits]))


def test_describe(model, picture, payload):
    """Every number is that of the network: maps bit for bit."""
    assert json.loads(json.dumps(payload, allow_nan=False)) == payload
    e = explained(model, picture)
    assert np.array_equal(maps_of(payload["levels"][0]), e.contribution_map[0].numpy())
    assert payload["levels"][0]["scale"] == plot.symmetric_scale(e.contribution_map)
    assert payload["levels"][0]["errors"] == e.completeness_error[0].tolist()
    assert [c["name"] for c in payload["classes"]] == [f"digit {int(c)}" for c in e.target[0]]
    logits = e.logits[0, e.target[0]]
    assert [c["logit"] for c in payload["classes"]] == logits.tolist()
    assert [c["probability"] for c in payload["classes"]] == pytest.approx(logits.sigmoid().tolist())
    assert (payload["logit_bias"], payload["temperature"]) == (model.logit_bias, model.temperature)
    assert payload["surroundings"] is None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(payload["picture"]))))
    np.testing.assert_allclose(pixels, 255 * picture.image[0].numpy(), atol=0.51)
    for i, level in enumerate(payload["levels"][1:], 1):
        entering = explained(model, picture, layer=i).contribution_map[0]
        assert np.array_equal(maps_of(level), entering.numpy())
        assert level["label"] == f"layer {i + 1}, {entering.shape[2]} x {entering.shape[1]}"


def test_describe_takes_less(model, picture, monkeypatch):
    """A view has fewer maps if they are many, or not asked for; classes without a map are listed."""
    found = viewer.describe(model, picture, classes=2, methods=["IxG", "Ours"], layers=False)
    assert [(level["count"], len(maps_of(level))) for level in found["levels"]] == [(2, 2)]
    assert len(found["classes"]) == 10
    assert [method["label"] for method in found["methods"]] == ["IxG"]
    assert maps_of(found["methods"][0]).shape == (1, 6, 9)
    monkeypatch.setattr(viewer, "_LAYER_NUMBERS", 2 * 10 * 6 * 9 - 1)
    found = viewer.describe(model, picture, methods=[])
    assert [level["count"] for level in found["levels"]] == [10, 1, 1]
    many = create_model("coda_xs_digits", num_classes=30).eval()
    for classes, maps, listed in ((None, 20, 20), (2, 2, 20), (25, 25, 25)):
        found = viewer.describe(many, picture, classes=classes, methods=[], layers=False)
        assert (found["levels"][0]["count"], len(found["classes"]), found["class_count"]) == (
            maps,
            listed,
            30,
        )


@pytest.mark.parametrize("classes", [0, 11])
def test_describe_refuses(model, picture, classes):
    with pytest.raises(ValueError, match=f"classes: expected 1 to 10, got {classes}"):
        viewer.describe(model, picture, classes=classes)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_leave_the_data(model, picture, name):
    """A parser finds one div with a heading and a script, whatever the name, and in it the same data."""
    payload = viewer.describe(model, picture._replace(name=name), methods=[], layers=False)
    tags, text = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)

        def handle_data(self, data):
            text.append(data)

    Parser().feed(viewer.element(payload))
    assert tags == ["div", "h2", "script"]
    assert json.loads(text[text.index(max(text, key=len))]) == payload
    assert any(part.startswith(name) for part in text)


# -- what a browser makes of it


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """An empty page. At the end, nothing may have been asked of a network, and no script have failed."""
    with browser.new_context(viewport={"width": 1200, "height": 1000}) as context:
        found, asked, failed = context.new_page(), [], []
        found.set_default_timeout(60_000)
        context.route(re.compile("^(?!file:|data:|blob:)"), lambda route: route.abort())
        found.on("request", lambda request: asked.append(request.url))
        found.on("pageerror", lambda error: failed.append(str(error)))
        yield found
        assert [url[:80] for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
        assert failed == []
        assert found.evaluate("window.hurt") is None


class View:
    """The first view of a page, used as a person uses it."""

    def __init__(self, page, path, text):
        path.write_text(text, encoding="utf-8")
        self.page = page
        page.goto(path.as_uri())
        page.wait_for_selector(".coda-viewer[data-started=drawn]")
        self.root = page.locator(".coda-viewer").first
        self.map = self.root.locator(".coda-main canvas")

    def choose(self, label, option):
        self.root.get_by_label(label, exact=True).select_option(option)

    def slide(self, label, value):
        self.root.get_by_label(label).fill(str(value))

    def point(self, x, y, width, height):
        """Move the pointer to the middle of a value of a map [height, width] that fills the drawing."""
        box = self.map.bounding_box()
        self.page.mouse.move(
            box["x"] + box["width"] * (x + 0.5) / width, box["y"] + box["height"] * (y + 0.5) / height
        )

    def reading(self):
        return self.root.locator(".coda-reading").inner_text().replace("\u2212", "-")

    def number(self):
        """The number of logits that was read."""
        return float(re.search(r"([+-][\d.e-]+) logits$", self.reading())[1])

    def proof(self):
        """(the sum, the network's own number, the error) as shown."""
        text = self.root.locator(".coda-proof").inner_text().replace("\u2212", "-")
        total = float(self.root.locator(".coda-proof strong").inner_text().replace("\u2212", "-"))
        own, error = re.search(r"(-?[\d.]+) \(error ([\d.e+-]+)\)$", text).groups()
        return total, float(own), float(error)

    def colours(self):
        """The drawing of the map, [H, W, 3]."""
        data = self.map.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)

    def squares(self, width, height):
        """The colour in the middle of each value, [height, width, 3]; all of its square has this colour."""
        colours = self.colours()
        side = colours.shape[0] // height
        assert colours.shape == (side * height, side * width, 3)
        squares = colours.reshape(height, side, width, side, 3).swapaxes(1, 2)
        assert np.ptp(squares, axis=(2, 3)).max() == 0
        return squares[:, :, side // 2, side // 2]


@pytest.fixture
def show(page, tmp_path):
    return lambda text: View(page, tmp_path / "page.html", text)


@pytest.fixture
def view(show, model, picture):
    """The view in a report."""
    return show(report.render(model, [picture.image], [picture.name], methods=[]))


def shades(values, scale):
    """A map in the colours of ``coda_fast.plot``."""
    import matplotlib

    return matplotlib.colormaps[plot.COLOURS]((values.double().numpy() / scale + 1) / 2, bytes=True)[..., :3]


def test_classes(view, model, picture):
    """A click on a class, or Enter, shows its map, each value as a square in the colours of the figures."""
    e = explained(model, picture)
    scale = plot.symmetric_scale(e.contribution_map)
    rows = view.root.locator("ul button")
    assert rows.count() == 10
    for k, act in ((0, None), (3, lambda: rows.nth(3).click()), (9, lambda: rows.nth(9).press("Enter"))):
        if act:
            act()
        assert np.abs(view.squares(9, 6) - shades(e.contribution_map[0, k], scale)).max() <= 1
        name = model.class_names[int(e.target[0, k])]
        assert view.root.locator(".coda-main figcaption").inner_text() == f"why {name}"
        pressed = [rows.nth(i).get_attribute("aria-pressed") for i in range(10)]
        assert pressed == ["true" if i == k else "false" for i in range(10)]
        probability = float(e.logits[0, e.target[0, k]].sigmoid())
        shown = plot.probability(probability).removeprefix("p ").removeprefix("= ")
        assert rows.nth(k).locator("> span").nth(2).inner_text() == shown
        bar = rows.nth(k).locator(".coda-bar").evaluate("bar => parseFloat(bar.style.width) / 100")
        assert bar == pytest.approx(probability, abs=1e-5)
    ends = view.root.locator(".coda-ends").inner_text().replace("\u2212", "-")
    assert [float(end) for end in re.findall(r"[-+][\d.e-]+", ends)] == pytest.approx(
        [-scale, scale], rel=5e-3
    )


def test_pixels_and_boxes(view, model, picture):
    """The pointer reads a pixel, a drag the sum of a box; so do arrow keys."""
    e = explained(model, picture)
    values = e.contribution_map[0, 0].double().numpy()
    for x, y in ((0, 0), (8, 5), (3, 4)):
        view.point(x, y, 9, 6)
        assert view.reading().startswith(f"pixel x {x}, y {y}: ")
        assert view.number() == pytest.approx(values[y, x], rel=SMALL)
    view.point(7, 4, 9, 6)
    view.page.mouse.down()
    view.point(2, 1, 9, 6)
    view.page.mouse.up()
    view.point(0, 0, 9, 6)  # a box stays
    assert view.reading().startswith("box x 2 to 7, y 1 to 4 (24 pixels): sum ")
    assert view.number() == pytest.approx(values[1:5, 2:8].sum(), abs=SMALL * np.abs(values).sum())
    view.map.press("Escape")
    view.page.mouse.move(0, 0)
    assert view.reading() == "Point at a pixel to read it; drag for the sum of a box."
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowUp"):  # from the middle, 4, 3
        view.map.press(key)
    assert view.reading().startswith("box x 4 to 5, y 3 to 4 (4 pixels): sum ")
    assert view.number() == pytest.approx(values[3:5, 4:6].sum(), abs=SMALL * np.abs(values).sum())


def test_proof(show, model, picture, payload):
    """The sum is computed from the maps on the page: it is the logit; of a wrong map it is not."""
    view = show(viewer.head() + viewer.element(payload))
    e = explained(model, picture)
    for k in (0, 4):
        view.root.locator("ul button").nth(k).click()
        total, own, error = view.proof()
        logit = float(e.logits[0, e.target[0, k]])
        summed = float(e.contribution_map[0, k].double().sum()) + model.logit_bias
        assert (total, own) == (pytest.approx(summed, abs=1e-6), pytest.approx(logit, abs=1e-6))
        assert error == pytest.approx(abs(summed - logit), abs=1e-9, rel=0.06)
        assert error < 1e-5
    maps = maps_of(payload["levels"][0]).copy()
    maps[0, 2, 3] += 0.5
    wrong = payload["levels"][0] | {"maps": base64.b64encode(maps.tobytes()).decode()}
    view = show(viewer.head() + viewer.element(payload | {"levels": [wrong]}))
    total, own, error = view.proof()
    assert error == pytest.approx(0.5, abs=1e-5)
    assert total - own == pytest.approx(0.5, abs=1e-5)


def test_difference(view, model, picture):
    """Why this class and not that: the difference of maps sums to that of logits."""
    e = explained(model, picture)
    view.root.locator("ul button").nth(1).click()
    view.choose("and not", "6")
    difference = e.contribution_map[0, 1].double() - e.contribution_map[0, 6].double()
    assert np.abs(view.squares(9, 6) - shades(difference, plot.symmetric_scale(difference))).max() <= 1
    view.point(5, 2, 9, 6)
    assert view.number() == pytest.approx(float(difference[2, 5]), rel=SMALL)
    total, own, error = view.proof()
    logits = e.logits[0, e.target[0]].double()
    assert own == pytest.approx(float(logits[1] - logits[6]), abs=1e-6)
    assert total == pytest.approx(float(difference.sum()), abs=1e-6)
    assert error < 1e-5
    view.root.locator("ul button").nth(6).click()  # of a class and itself there is no difference
    assert view.root.get_by_label("and not", exact=True).input_value() == "-1"


def test_layers(view, model, picture):
    """What enters a layer, at the size of the layer."""
    entering = explained(model, picture, layer=2)
    values = entering.contribution_map[0]
    height, width = values.shape[1:]
    assert (height, width) != (6, 9)
    view.root.locator("ul button").nth(2).click()
    view.choose("contributions of", "2")
    view.point(1, 0, width, height)
    assert view.reading().startswith("place x 1, y 0: ")
    assert view.number() == pytest.approx(float(values[2, 0, 1]), rel=SMALL)
    total, own, error = view.proof()
    assert own == pytest.approx(float(entering.logits[0, entering.target[0, 2]]), abs=1e-6)
    assert error < 1e-5
    view.choose("contributions of", "0")
    view.point(1, 0, 9, 6)
    assert view.reading().startswith("pixel x 1, y 0: ")


def test_layers_of_one_class(show, model, picture, monkeypatch):
    """Classes whose map the page does not hold cannot be chosen."""
    monkeypatch.setattr(viewer, "_LAYER_NUMBERS", 0)
    payload = viewer.describe(model, picture, classes=4, methods=[])
    view = show(viewer.head() + viewer.element(payload))
    enabled = lambda: [k for k in range(10) if view.root.locator("ul button").nth(k).is_enabled()]
    assert enabled() == [0, 1, 2, 3]
    assert "The first 4 have maps." in view.root.inner_text()
    view.root.locator("ul button").nth(3).click()
    view.choose("contributions of", "1")
    assert enabled() == [0]
    view.point(0, 0, 9, 6)
    entering = explained(model, picture, layer=1).contribution_map
    assert view.number() == pytest.approx(float(entering[0, 0, 0, 0]), rel=SMALL)


def test_temperature(view, model, picture):
    """The network at another T, as if it had been made with it; and back."""
    cooler = create_model("coda_xs_digits", temperature=model.temperature * 10**0.5).eval()
    cooler.load_state_dict(model.state_dict())
    e = explained(cooler, picture)
    logit = lambda: float(
        view.root.locator("ul button").first.locator("> span").nth(3).inner_text().replace("\u2212", "-")
    )
    before, heading = logit(), view.root.locator("h2").inner_text()
    back = view.root.get_by_role("button", name="back to")
    assert back.is_disabled()
    view.slide("temperature", 0.5)
    assert logit() == pytest.approx(float(e.logits[0, e.target[0, 0]]), abs=6e-4)
    view.point(4, 4, 9, 6)
    assert view.number() == pytest.approx(float(e.contribution_map[0, 0, 4, 4]), rel=1e-5)
    total, own, error = view.proof()
    assert own == pytest.approx(float(e.logits[0, e.target[0, 0]]), abs=1e-5)
    assert error < 1e-5
    probability = float(e.logits[0, e.target[0, 0]].sigmoid())
    bar = view.root.locator(".coda-bar").first.evaluate("bar => parseFloat(bar.style.width) / 100")
    assert bar == pytest.approx(probability, abs=1e-5)
    assert (
        view.root.locator("h2").inner_text() == f"{heading}, at the network's own T = {model.temperature:g}"
    )
    back.click()
    assert (logit(), view.root.locator("h2").inner_text()) == (before, heading)


def test_blending(view, picture, model):
    """From the map to the picture."""
    view.slide("opacity of the map", 0)
    pixels = np.round(255 * picture.image[0].numpy())[..., None].repeat(3, 2)
    assert np.abs(view.squares(9, 6) - pixels).max() <= 1
    view.slide("opacity of the map", 50)
    e = explained(model, picture)
    full = shades(e.contribution_map[0, 0], plot.symmetric_scale(e.contribution_map))
    assert np.abs(view.squares(9, 6) - (full + pixels) / 2).max() <= 2


def test_crops(show, model):
    """The crop that the network saw lies in its place in the picture, and is read there."""
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 120, 3), np.uint8))
    preprocessing = Preprocessing(1, resize=8, crop=8)
    image = preprocessing(wide)
    picture = report.Picture("wide.png", image, plot.View.of(wide, preprocessing))
    view = show(viewer.head() + viewer.element(viewer.describe(model, picture, methods=[])))
    box = view.map.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(3, abs=0.02)
    values = model.explain(image[None]).contribution_map[0, 0]
    view.point(8 + 6, 3, 24, 8)
    assert view.reading().startswith("pixel x 6, y 3: ")
    assert view.number() == pytest.approx(float(values[3, 6]), rel=SMALL)
    view.point(7, 3, 24, 8)
    assert view.reading().startswith("Point at a pixel")
    colours = view.colours()
    third = colours.shape[1] // 3
    assert np.ptp(colours[:, : third - 4], axis=2).max() == 0  # grey beside the crop
    assert np.ptp(colours[:, third + 4 : 2 * third - 4], axis=2).max() > 100


def test_other_methods(show, model, picture):
    """Maps of other methods stand beside it, on scales of their own."""
    payload = viewer.describe(model, picture, methods=["IxG", "Grad"], layers=False)
    view = show(viewer.head() + viewer.element(payload))
    figures = view.root.locator(".coda-methods figure")
    name = payload["classes"][0]["name"]
    texts = [figures.nth(i).inner_text().strip() for i in range(figures.count())]
    assert texts == [f"{method} for {name}, a scale of its own" for method in ("IxG", "Grad")]
    for i, method in enumerate(payload["methods"]):
        view.map = figures.nth(i).locator("canvas")
        expected = shades(torch.tensor(maps_of(method)[0]), method["scale"])
        assert np.abs(view.squares(9, 6) - expected).max() <= 1


def test_save(view, tmp_path):
    """The view as a PNG file, without a server."""
    with view.page.expect_download() as waiting:
        view.root.get_by_role("button", name="Save as PNG").click()
    assert waiting.value.suggested_filename == "a_explained.png"
    waiting.value.save_as(tmp_path / "saved.png")
    pixels = np.asarray(Image.open(tmp_path / "saved.png").convert("RGB")).astype(int)
    assert (pixels == 255).all(2).mean() > 0.3  # a white page
    assert ((pixels[..., 0] - pixels[..., 2]) > 200).sum() > 100  # red
    assert ((pixels[..., 2] - pixels[..., 0]) > 200).sum() > 100  # blue


def test_hostile_names(show, picture):
    """Names are shown as they are, and do nothing (the fixture checks that no script ran)."""
    names = [*HOSTILE, *(f"digit {i}" for i in range(4, 10))]
    torch.manual_seed(0)
    hostile = create_model("coda_xs_digits", class_names=names).eval()
    view = show(report.render(hostile, [picture.image] * len(HOSTILE), HOSTILE, methods=["IxG"]))
    views = view.page.locator(".coda-viewer[data-started=drawn]")
    assert views.count() == len(HOSTILE)
    for i, name in enumerate(HOSTILE):
        assert views.nth(i).locator("h2").inner_text().startswith(f"{name}: ")
    shown = view.root.locator(".coda-name").all_inner_texts()
    assert set(HOSTILE) <= {text.strip() for text in shown}
    assert view.page.locator("img[src=x], h2 b, .coda-viewer script:not([type])").count() == 0


def test_views_that_are_added_later(page, tmp_path, payload):
    """As an app does, by innerHTML; a second copy of the script changes nothing."""
    (tmp_path / "page.html").write_text(f"{viewer.head()}{viewer.head()}<main></main>", encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    for name in ("first", "second"):
        element = viewer.element(payload | {"name": name})
        page.evaluate("text => { document.querySelector('main').innerHTML = text }", element)
        page.wait_for_selector(".coda-viewer[data-started=drawn]")
        assert page.locator("h2").inner_text().startswith(f"{name}: ")
        assert page.locator(".coda-main canvas").count() == 1


def test_damaged_data(page, tmp_path):
    """One view that cannot be shown says so, and the next one is not lost."""
    broken = '<div class="coda-viewer"><h2>x</h2><script type="application/json">{</script></div>'
    (tmp_path / "page.html").write_text(viewer.head() + broken, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.get_by_text("This view cannot be shown: ").count() == 1


def test_narrow_screens_and_names_of_controls(show, model, picture):
    """Nothing is wider than a screen of 400 pixels, and each control has a name for screen readers."""
    view = show(report.render(model, [picture.image], ["a_name_without_spaces" * 6], methods=["IxG"]))
    view.page.set_viewport_size({"width": 400, "height": 800})
    assert view.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert view.map.bounding_box()["width"] > 300
    controls = view.root.locator("button, select, input, canvas")
    for i in range(controls.count()):
        name = "node => node.getAttribute('aria-label') || node.textContent || node.labels?.[0].textContent"
        assert controls.nth(i).evaluate(name).strip()


def test_what_is_on_the_screen(view, model, picture):
    """A white page, and on it the map with sharp squares, not only in the memory of the drawing."""
    pixels = np.asarray(Image.open(io.BytesIO(view.page.screenshot())).convert("RGB")).astype(int)
    assert (pixels.min(2) > 250).mean() > 0.5
    box, expected = view.map.bounding_box(), view.squares(9, 6)
    for x, y in ((0, 0), (8, 5), (3, 4)):
        for part in (0.1, 0.5, 0.9):
            column = int(box["x"] + box["width"] * (x + part) / 9)
            row = int(box["y"] + box["height"] * (y + part) / 6)
            assert np.abs(pixels[row, column] - expected[y, x]).max() <= 1
    inside = [int(box[side]) for side in ("y", "x", "height", "width")]
    shown = pixels[inside[0] + 1 :, inside[1] + 1 :][: inside[2] - 2, : inside[3] - 2]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= 9 * 6  # no colours between those of two squares


def test_without_scripts(browser, tmp_path, model, picture):
    """The picture and the map of the most likely class, in words and pictures."""
    path = tmp_path / "page.html"
    path.write_text(report.render(model, [picture.image], [picture.name], methods=[]), encoding="utf-8")
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.locator("h2").inner_text().startswith("a.png: ")
        assert page.locator("canvas").count() == 0
        images = page.locator("noscript img")
        assert images.count() == 2
        for i in range(2):
            assert images.nth(i).bounding_box()["height"] >= 160
