"""The web page in Chromium, as its users see it."""

import base64
import re
import time

import pytest
import torch
from support_app import CLASSES, PATIENCE, encoded, film, needs_browser

from coda_fast import viewer
from coda_fast.data.photographs import example_photographs

# Once is enough: a release of torch changes nothing in the browser.
pytestmark = pytest.mark.slow


def give(page, data, name="a.png"):
    page.set_input_files(
        "#coda-picture input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data}
    )


def drawn(page, heading):
    """Wait for a view whose heading has this in it."""
    page.wait_for_selector(f'.coda-viewer[data-started="drawn"] h2:has-text("{heading}")', timeout=PATIENCE)


def number(text):
    return float(text.replace("\u2212", "-"))


def rows(page):
    """The classes that the view lists: {name: (probability, logit)}."""
    cells = [row.locator("> *").all_inner_texts() for row in page.locator("button.coda-row").all()]
    return {
        name: (number(p.replace("> ", "").replace("< ", "")), number(logit)) for name, _, p, logit in cells
    }


def logits_of(model, data):
    with torch.no_grad():
        return model(model.transform(data)[None])[0]


def check_rows(found, model, data):
    logits = logits_of(model, data)
    assert list(found) == [CLASSES[int(c)] for c in logits.argsort(descending=True)]
    for name, (probability, logit) in found.items():
        expected = float(logits[CLASSES.index(name)])
        assert logit == pytest.approx(expected, abs=6e-4)
        assert probability == pytest.approx(torch.tensor(expected).sigmoid().item(), abs=6e-4)


@needs_browser
def test_a_picture(opened, networks, waiting):
    """Upload, probabilities, the map of another class, and a pixel read by the pointer."""
    data, model, page = encoded(), networks["first"], opened()
    give(page, data, "<b>it</b>.png")
    drawn(page, "<b>it</b>.png: ")
    check_rows(rows(page), model, data)
    explained = model.explain(
        model.transform(data)[None], model(model.transform(data)[None]).topk(10).indices
    )
    pixels = page.eval_on_selector(".coda-main canvas", "canvas => canvas.toDataURL()")
    for k in (0, 3):
        page.locator("button.coda-row").nth(k).click()
        assert page.inner_text(".coda-main figcaption") == f"why {CLASSES[int(explained.target[0, k])]}"
        page.focus(".coda-main canvas")
        page.keyboard.press("Escape")
        box = page.locator(".coda-main canvas").bounding_box()
        # the middle third of the width is what the network saw, 8 x 8 pixels; this is the pixel x 5, y 2
        page.mouse.move(
            box["x"] + box["width"] * (1 / 6 + 5.5 / 8 * 2 / 3), box["y"] + box["height"] * 2.5 / 8
        )
        words = re.fullmatch(
            "pixel x 5, y 2: ([+\u2212][0-9.e\u2212-]+) logits", page.inner_text(".coda-reading")
        )
        found = number(words[1].replace("+", ""))
        assert found == pytest.approx(float(explained.contribution_map[0, k, 2, 5]), rel=1e-5)
    assert page.eval_on_selector(".coda-main canvas", "canvas => canvas.toDataURL()") != pixels
    assert page.locator(".coda-methods figcaption").all_inner_texts()[0].startswith("IxG for ")
    assert waiting() == []
    # The input still shows the picture, which is no longer on the server.
    assert page.get_attribute("#coda-picture img", "src").startswith("data:image/")
    assert page.eval_on_selector("#coda-picture img", "image => image.naturalWidth") == 30
    page.click("#coda-picture button[aria-label='Remove Image']")
    page.wait_for_selector("#coda-view .coda-empty")
    assert page.locator(".toast-body").count() == 0


def choose(page, where, text):
    page.click(f"{where} input")
    page.locator("[role=option]", has_text=text).click()


@needs_browser
def test_another_network_and_methods(opened, networks, waiting):
    """They are chosen for the picture that is shown, without sending it anew."""
    data, page = encoded(3), opened()
    give(page, data)
    drawn(page, "a.png: ")
    check_rows(rows(page), networks["first"], data)
    logits = logits_of(networks["second"], data)
    choose(page, "#coda-network", "second")
    drawn(page, f"a.png: {viewer.verdict(logits, CLASSES, 'second')}")
    check_rows(rows(page), networks["second"], data)
    page.keyboard.press("Escape")
    page.click("#coda-methods button[aria-label*=GCam], #coda-methods .token:has-text('GCam') .token-remove")
    page.wait_for_selector(".coda-methods figure:nth-child(2)", state="detached")
    assert [text.split()[0] for text in page.locator(".coda-methods figcaption").all_inner_texts()] == ["IxG"]
    assert waiting() == []


@needs_browser
def test_a_broken_file(opened, networks, waiting):
    """One clear sentence, without the path of a temporary file, that stays until it is closed. The picture
    before it is not shown as if it were this one; the next picture is explained.
    """
    page = opened()
    give(page, encoded(9), "before.png")
    drawn(page, "before.png: ")
    give(page, b"<b>nothing</b>", "<b>broken</b>.png")
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "<b>broken</b>.png: not an image that Pillow can read" in toast.inner_text()
    assert "/" not in toast.inner_text().replace("</b>", "")
    assert waiting() == []
    page.wait_for_selector("#coda-picture img", state="detached")
    page.wait_for_selector("#coda-view .coda-empty")
    assert page.locator(".coda-viewer").count() == 0
    assert toast.locator(".timer").count() == 0
    data = encoded(4)
    give(page, data)
    drawn(page, "a.png: ")
    check_rows(rows(page), networks["first"], data)


@needs_browser
def test_two_users(opened, networks):
    """Each sees the own picture, whoever asked last."""
    pages_, data = [opened(), opened()], [encoded(5), encoded(6)]
    for page, picture in zip(pages_, data, strict=True):
        give(page, picture)
    for _ in range(2):
        for page, picture in zip(pages_, data, strict=True):
            drawn(page, "a.png: ")
            check_rows(rows(page), networks["first"], picture)
        choose(pages_[0], "#coda-network", "first")  # again, while the other one waits


@needs_browser
def test_the_last_choice_is_shown(opened, networks, monkeypatch):
    """Also if it was made while the answer to an earlier one was awaited."""
    describe, page, data = viewer.describe, opened(), encoded(8)

    def slow(*arguments, **options):
        time.sleep(0.5)
        return describe(*arguments, **options)

    give(page, data)
    drawn(page, "a.png: ")
    monkeypatch.setattr(viewer, "describe", slow)
    choose(page, "#coda-network", "second")
    choose(page, "#coda-network", "first")
    drawn(page, viewer.verdict(logits_of(networks["second"], data), CLASSES))
    drawn(page, viewer.verdict(logits_of(networks["first"], data), CLASSES))
    check_rows(rows(page), networks["first"], data)


@needs_browser
def test_an_example_and_its_report(opened, networks, tmp_path):
    path, credit = example_photographs()[0]
    page = opened()
    page.locator("#coda-examples button").first.click()
    heading = credit.replace(": ", " (") + "): "
    drawn(page, heading)
    check_rows(rows(page), networks["first"], path.read_bytes())
    with page.expect_download() as download:
        page.click("#coda-report")
    download.value.save_as(tmp_path / "report.html")
    assert download.value.suggested_filename == "coda_report.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert heading in text
    assert viewer.verdict(logits_of(networks["first"], path), CLASSES, "first") in text


@needs_browser
def test_clipboard_and_webcam(opened, networks, waiting):
    page = opened(permissions=["clipboard-read", "clipboard-write", "camera"])
    data = encoded(7)
    page.evaluate(
        "async (data) => navigator.clipboard.write([new ClipboardItem({'image/png': "
        "await (await fetch('data:image/png;base64,' + data)).blob()})])",
        base64.b64encode(data).decode(),
    )
    page.click("#coda-picture button[aria-label='Paste from clipboard']")
    drawn(page, "")
    check_rows(rows(page), networks["first"], data)  # a browser encodes it anew, without loss
    page.click("#coda-picture button[aria-label='Remove Image']")
    page.wait_for_selector("#coda-view .coda-empty")
    page.click("#coda-picture button[aria-label='Capture from camera']")
    page.click("#coda-picture button:has-text('Access Webcam')")
    page.wait_for_function("document.querySelector('#coda-picture video')?.readyState > 2")
    page.click("#coda-picture button[aria-label='capture photo']")
    drawn(page, "")
    assert len(rows(page)) == 10
    assert waiting() == []


@needs_browser
def test_on_a_phone(browser, server):
    """The columns lie below each other, and nothing is wider than the screen."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(server)
    page.wait_for_selector("#coda-picture input[type=file]", state="attached")
    give(page, encoded())
    drawn(page, "a.png: ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#coda-view").bounding_box()["y"] > page.locator("#coda-report").bounding_box()["y"]
    assert page.locator(".coda-main canvas").bounding_box()["width"] > 300
    page.wait_for_function("Math.abs(document.querySelector('#coda-view').getBoundingClientRect().y) < 5")
    context.close()


@needs_browser
def test_a_video(opened, waiting, tmp_path):
    data, page = film(tmp_path / "a.mp4", 30, 10), opened()
    page.click("button[role=tab]:has-text('Video')")
    page.set_input_files(
        "#coda-video input[type=file]", {"name": "a.mp4", "mimeType": "video/mp4", "buffer": data}
    )
    page.wait_for_selector("#coda-view video", timeout=PATIENCE)
    assert re.match(r"a\.mp4: digit \d \(p .*, explained by first", page.inner_text("#coda-view h2"))
    assert "30 frames, at most the first 10 seconds" in page.inner_text("#coda-view")
    page.wait_for_function("document.querySelector('#coda-view video').readyState > 1")
    size = page.eval_on_selector("#coda-view video", "video => [video.videoWidth, video.videoHeight]")
    assert size[0] > 2 * size[1] * 0.7  # two panels side by side
    assert waiting() == []
