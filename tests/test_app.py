"""The web page: through a browser as its users see it, and by requests that no browser would send."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import coda_fast
from coda_fast import app, cli, pretrained, viewer
from coda_fast.app import page as pages
from coda_fast.app import uploads
from coda_fast.data.photographs import example_photographs

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt install chromium)")
# A minute or more is no failure on a busy machine; no test asserts how long something takes.
PATIENCE = 120_000  # milliseconds
# Once is enough: a release of torch changes nothing in the browser.
pytestmark = pytest.mark.slow
CLASSES = [f"digit {i}" for i in range(10)]
FLAGS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def network(seed):
    torch.manual_seed(seed)
    # a low temperature, for maps with strong contributions
    return coda_fast.create_model("coda_xs_digits", class_names=CLASSES, temperature=1.0).eval()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def encoded(seed=0, size=(20, 30), format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def networks():
    return {"first": network(0), "second": network(1)}


@pytest.fixture(scope="module")
def built():
    """All pages that were made, to look at their folders."""
    found, build = [], app.build

    def remembered(*arguments, **options):
        found.append(build(*arguments, **options))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build", remembered)
        yield found


@pytest.fixture(scope="module")
def server(networks, built):
    before = dict(os.environ)
    with app.running(networks, port=free_port()) as address:
        folder = Path(built[0].folder.name)
        assert folder.is_dir()
        yield address
    assert not folder.exists()
    assert set(os.environ) - set(before) <= {"TORCHINDUCTOR_CACHE_DIR"}
    assert {name: os.environ.get(name) for name in before} | {"PYTEST_CURRENT_TEST": ""} == before | {
        "PYTEST_CURRENT_TEST": ""
    }


@pytest.fixture(scope="module")
def waiting(server, built):
    """What lies in the folder of uploads, when the answer that is under way has ended."""

    def files():
        end = time.monotonic() + 5
        while (found := list(built[0].uploads.folder.rglob("*"))) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    return files


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """A function that opens the page for another user. No page may ask for anything outside this computer,
    and none may end with an error in its script.
    """
    contexts, asked, errors = [], [], []

    def open_page(**options):
        context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server)
        page.wait_for_selector("#coda-picture input[type=file]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []
    assert errors == []


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


# -- in a browser


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
    drawn(page, f"a.png: {viewer.verdict(logits, CLASSES)}")
    check_rows(rows(page), networks["second"], data)
    page.keyboard.press("Escape")
    page.click("#coda-methods button[aria-label*=GCam], #coda-methods .token:has-text('GCam') .token-remove")
    page.wait_for_selector(".coda-methods figure:nth-child(2)", state="detached")
    assert [text.split()[0] for text in page.locator(".coda-methods figcaption").all_inner_texts()] == ["IxG"]
    assert waiting() == []


@needs_browser
def test_a_broken_file(opened, networks, waiting):
    """One clear sentence, without the path of a temporary file; the next picture is explained."""
    page = opened()
    give(page, b"<b>nothing</b>", "<b>broken</b>.png")
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "<b>broken</b>.png: not an image that Pillow can read" in toast.inner_text()
    assert "/" not in toast.inner_text().replace("</b>", "")
    assert waiting() == []
    page.wait_for_selector("#coda-picture img", state="detached")
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
    assert viewer.verdict(logits_of(networks["first"], path), CLASSES) in text


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


# -- by requests


class User:
    """Asks the server as the page does."""

    def __init__(self, server):
        self.client = httpx.Client(base_url=server, timeout=PATIENCE / 1000)
        config = self.client.get("/config").json()
        self.functions = {f["api_name"]: f["id"] for f in config["dependencies"] if f["api_name"]}
        self.count = 0

    def upload(self, data, name="a.png"):
        answer = self.client.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        (path,) = answer.json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, function, *data):
        """The answer's values, or the message of its error."""
        self.count += 1
        session = f"{id(self)}-{self.count}"
        joined = self.client.post(
            "/gradio_api/queue/join",
            json={"data": data, "fn_index": self.functions[function], "session_hash": session},
        )
        assert joined.status_code == 200, joined.text
        answers = []
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    answers.append(message)
        (message,) = answers
        return message["output"]["data" if message["success"] else "error"]


@pytest.fixture(scope="module")
def user(server):
    return User(server)


def view_of(text):
    return json.loads(re.search('<script type="application/json">(.*)</script>', text)[1])


def huge():
    """A PNG that claims 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (huge(), "bomb.png", "bomb.png: too large: "),
        (encoded()[:300], "cut.png", "cut.png: damaged or truncated image: "),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "a.svg: not an image that Pillow can read"),
        (encoded(format="TIFF")[:-50], "a.tiff", "a.tiff: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.png", "a.png: not an image"),
        (b"", "empty.png", "empty.png: not an image that Pillow can read"),
    ],
)
def test_hostile_files(user, waiting, monkeypatch, data, name, message):
    """They meet the decoder of the command line and no other, and are deleted."""
    opening, callers = Image.open, []

    def watched(*arguments, **options):
        callers.append(sys._getframe(1).f_globals["__name__"])
        return opening(*arguments, **options)

    monkeypatch.setattr(Image, "open", watched)
    found = user.ask("explain", user.upload(data, name), "first", [])
    assert isinstance(found, str)
    assert found.startswith(message)
    assert "/tmp" not in found
    assert "\n" not in found
    assert set(callers) == {"coda_fast.data.decode"}
    assert waiting() == []


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"path": None, "url": "data:image/png;base64,%%%"}, "expected a picture, got other data"),
        ({"path": None, "url": "http://127.0.0.1/a.png"}, "expected a picture, got other data"),
        ({"path": None, "url": "file:///etc/hostname"}, "expected a picture, got other data"),
    ],
)
def test_other_input(user, sent, message):
    sent |= {"meta": {"_type": "gradio.FileData"}}
    assert message in user.ask("explain", sent, "first", [])


def test_nothing_was_sent(user):
    """The page is as at the beginning; a report of nothing is refused."""
    assert "appears here" in user.ask("explain", None, "first", [])[1]
    assert user.ask("report", None, "first", []) == "Give a picture first."


def test_no_other_file_is_read(user, server, built, waiting):
    """Neither one outside the folder nor an upload whose answer was given."""
    outside = {"path": str(example_photographs()[0].path), "meta": {"_type": "gradio.FileData"}}
    assert not isinstance(user.ask("explain", outside, "first", []), list)
    inside = outside | {"path": str(next(Path(built[0].folder.name).glob("*/*.png")))}  # of the page itself
    assert "expected an upload, got another file" in user.ask("explain", inside, "first", [])
    assert Path(inside["path"]).exists()
    sent = user.upload(encoded())
    shown = user.client.get(f"/gradio_api/file={sent['path']}")  # as the input of the page does
    assert shown.content == encoded()
    assert "html" not in shown.headers.get("content-type", "")
    assert isinstance(user.ask("explain", sent, "first", []), list)
    assert user.client.get(f"/gradio_api/file={sent['path']}").status_code == 404
    outwards = f"{built[0].uploads.folder}/../../../../etc/hostname"
    for path in (outwards, outwards.replace("..", "%2e%2e")):
        assert user.client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert "send it again" in user.ask("explain", sent, "first", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("third", []), "network: expected one of first, second, got"),
        (("first", ["RISE"]), "methods: expected at most 2 of IxG, GCam"),
        (("first", ["IxG", "GCam", "Grad"]), "methods: expected at most 2 of"),
    ],
)
def test_other_choices(user, waiting, arguments, message):
    found = user.ask("explain", user.upload(encoded()), *arguments)
    assert message.replace("'", "&#x27;") in found
    assert waiting() == []


def test_many_at_once(networks, server, waiting, monkeypatch):
    """Users who ask at the same time, some of them with the same file, get the answers to their own
    questions; the networks work for one at a time.
    """
    describe, inside, most = viewer.describe, [], []

    def watched(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        try:
            return describe(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(viewer, "describe", watched)

    def question(i):
        user, name, data = User(server), ("first", "second")[i % 2], encoded(i // 3)
        with contextlib.closing(user.client):
            held, view = user.ask("explain", user.upload(data, f"{i}.png"), name, [])
            again = user.ask("explain", held, name, [])
        assert again[1] == view
        return view_of(view), networks[name], data, f"{i}.png"

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(question, range(12)))
    for view, model, data, name in found:
        image = model.transform(data)[None]
        assert view["name"] == name
        expected = model.explain(image, model(image).topk(10).indices)
        maps = np.frombuffer(base64.b64decode(view["levels"][0]["maps"]), "<f4")
        np.testing.assert_allclose(maps, expected.contribution_map.flatten().numpy(), rtol=1e-4, atol=1e-6)
    assert set(most) == {1}
    assert waiting() == []


def test_bounds(user, server, built, waiting, monkeypatch):
    """Files that are too large, too many, or abandoned; and paths that the page does not use."""
    post = user.client.post
    monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
    assert post("/gradio_api/upload", files={"files": ("a", b"x" * 70_000)}).status_code == 413
    assert post("/gradio_api/queue/join", content=b"x" * 2001).status_code == 413
    assert post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert (
        post("/gradio_api/upload", files=[("files", ("a", b"x")), ("files", ("b", b"y"))]).status_code == 400
    )
    assert post("/gradio_api/upload", data={"files": "a"}).status_code == 400
    assert waiting() == []
    monkeypatch.setattr(uploads, "MOST_WAITING", 3)
    paths = [Path(user.upload(b"x", name)["path"]) for name in ("../../a.png", "b/c.m p4", "d")]
    assert [path.name for path in paths] == ["upload.png", "upload.mp4", "upload"]
    assert len({path.parent for path in paths}) == 3
    assert post("/gradio_api/upload", files={"files": ("a", b"x")}).status_code == 503
    monkeypatch.setattr(uploads, "LIFETIME", -1.0)
    path = Path(user.upload(b"y")["path"])
    assert [p for p in built[0].uploads.folder.rglob("*") if p.is_file()] == [path]
    shutil.rmtree(path.parent)
    for other in ("process_recording", "component_server", "proxy=http://127.0.0.1/", "deep_link", "call/a"):
        assert user.client.get(f"/gradio_api/{other}").status_code == 404
        assert post(f"/gradio_api/{other}", json={}).status_code == 404
    for file in ("/etc/hostname", __file__, "setup.py"):
        assert user.client.get(f"/gradio_api/file={file}").status_code == 403


def test_a_full_queue(user, server, waiting, monkeypatch):
    """One question is answered and as many as the queue holds wait; the next one is refused."""
    go = threading.Event()
    monkeypatch.setattr(viewer, "describe", lambda *arguments, **options: go.wait(30) and {})
    monkeypatch.setattr(viewer, "element", lambda payload: "done")

    url = f"data:image/png;base64,{base64.b64encode(encoded()).decode()}"
    picture = {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}
    question = {"data": [picture, "first", []], "fn_index": user.functions["explain"]}
    answers = [
        user.client.post("/gradio_api/queue/join", json=question | {"session_hash": f"full-{i}"}).status_code
        for i in range(pages.WAITING + 3)
    ]
    go.set()
    assert answers[: pages.WAITING] == [200] * pages.WAITING
    assert answers[-1] == 503


def test_an_unexpected_error_says_nothing(user, waiting, monkeypatch, capfd):
    """The terminal shows the traceback of a bug; the page does not."""

    def fails(*arguments, **options):
        raise RuntimeError("secret")

    monkeypatch.setattr(viewer, "describe", fails)
    found = user.ask("explain", user.upload(encoded()), "first", [])
    assert "secret" not in str(found)
    assert waiting() == []

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(viewer, "describe", no_memory)
    assert user.ask("explain", user.upload(encoded()), "first", []) == "not enough memory for this picture"


# -- videos


def film(path, frames, rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            pixels = np.zeros((32, 48, 3), np.uint8)
            pixels[8:24, i % 32 : i % 32 + 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


@needs_browser
def test_a_video(opened, waiting, tmp_path):
    data, page = film(tmp_path / "a.mp4", 30, 10), opened()
    page.click("button[role=tab]:has-text('Video')")
    page.set_input_files(
        "#coda-video input[type=file]", {"name": "a.mp4", "mimeType": "video/mp4", "buffer": data}
    )
    page.wait_for_selector("#coda-view video", timeout=PATIENCE)
    assert re.match(r"a\.mp4: digit \d", page.inner_text("#coda-view h2"))
    assert "30 frames, at most the first 10 seconds" in page.inner_text("#coda-view")
    page.wait_for_function("document.querySelector('#coda-view video').readyState > 1")
    size = page.eval_on_selector("#coda-view video", "video => [video.videoWidth, video.videoHeight]")
    assert size[0] > 2 * size[1] * 0.7  # two panels side by side
    assert waiting() == []


def test_long_and_broken_videos(user, waiting, tmp_path, monkeypatch):
    """Both are bounded: seconds, of which the first are explained, and frames."""

    def no_other_program(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", no_other_program)
    monkeypatch.setattr(pages, "MOST_SECONDS", 2.0)
    _, view = user.ask("video", user.upload(film(tmp_path / "a.mp4", 30, 10), "a.mp4"), "first")
    assert "20 frames, at most the first 2 seconds" in view
    monkeypatch.setattr(pages, "MOST_FRAMES", 12)
    found = user.ask("video", user.upload(film(tmp_path / "b.mp4", 30, 10), "b.mp4"), "first")
    assert found == "b.mp4: expected a video of at most 12 frames, got more"
    for data in (b"nothing", encoded()):
        found = user.ask("video", user.upload(data, "c.mp4"), "first")
        assert found.startswith("c.mp4: ")
        assert "/tmp" not in found
    assert waiting() == []


# -- starting and ending


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("app") / "net.safetensors"
    coda_fast.save(network(0), path)
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["app", *map(str, arguments)])
    return stop.value.code


def test_the_port_is_taken(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("--checkpoint", checkpoint, "--port", port) == 2
    assert capsys.readouterr().err == (
        f"coda-fast: port: expected a free one, got {port}, which is taken or not permitted\n"
    )


def test_gradio_is_missing(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run("--checkpoint", checkpoint) == 2
    assert capsys.readouterr().err == "coda-fast: the app needs gradio: pip install 'coda-fast[app]'\n"


@pytest.mark.parametrize(
    ("networks_", "default", "error", "message"),
    [
        ({}, None, ValueError, "networks: expected at least one, got none"),
        ({"a": network(0)}, "b", ValueError, "default: expected one of a, got 'b'"),
        (
            {"a": torch.nn.Identity()},
            None,
            TypeError,
            "networks: a: expected a coda_fast.Network, got a Identity",
        ),
    ],
)
def test_build_refuses(networks_, default, error, message):
    with pytest.raises(error, match=re.escape(message)):
        app.build(networks_, default)


def test_without_captum_and_av(networks, monkeypatch):
    """The page says what is missing."""
    find_spec = pages.importlib.util.find_spec
    monkeypatch.setattr(
        pages.importlib.util, "find_spec", lambda name: None if name in ("captum", "av") else find_spec(name)
    )
    page = app.build(networks)
    with page.folder:
        text = json.dumps(page.get_config_file()["components"])
    assert "They need captum: pip install 'coda-fast[evaluation]'" in text
    assert "Videos need PyAV: pip install 'coda-fast[video]'" in text


def test_example_photographs():
    """Each is there, can be decoded, and names its licence."""
    found = example_photographs()
    assert len(found) == 6
    for path, credit in found:
        assert min(coda_fast.data.decode(path).size) >= 300
        assert credit.endswith(("CC0", "CC BY 2.0", "public domain"))


class Program:
    """The command in a process of its own."""

    def __init__(self, temporary, *options):
        port = free_port()
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coda_fast.cli", "app", "--port", str(port), *options],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        watch = threading.Timer(120, self.process.kill)
        watch.start()
        self.line = self.process.stdout.readline()
        watch.cancel()
        self.address = f"http://127.0.0.1:{port}/"

    def end(self, number):
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=PATIENCE / 1000)
        return self.process.returncode, output, errors


def test_the_command(tmp_path):
    """One line with the address; an interruption ends it quietly and leaves nothing behind. By default the
    page has the networks of the package.
    """
    program = Program(tmp_path)
    assert program.line == f"{program.address}   (Ctrl-C ends it)\n"
    user = User(program.address)
    for name in pretrained.names():
        assert "a.png: " in user.ask("explain", user.upload(encoded()), name, [])[1]
    question = {"fn_index": user.functions["explain"], "session_hash": "open"}
    for _ in range(9):
        data = [user.upload(encoded()), "coda_xs_imagenette", ["IntGrad", "GCam"]]
        assert user.client.post("/gradio_api/queue/join", json=question | {"data": data}).status_code == 200
    with user.client.stream("GET", "/gradio_api/queue/data?session_hash=open"):  # a page that still waits
        assert program.end(signal.SIGINT) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_stays_flat(checkpoint, tmp_path):
    """1,000 requests of as many users, with pictures, errors and reports among them."""
    psutil = pytest.importorskip("psutil")
    program = Program(tmp_path, "--checkpoint", str(checkpoint))
    process, user, sizes = psutil.Process(program.process.pid), User(program.address), []
    for i in range(1000):
        data = encoded(i) if i % 10 else b"nothing"
        found = user.ask("report" if i % 10 == 5 else "explain", user.upload(data), "net", ["IxG"])
        assert isinstance(found, str) == (i % 10 == 0)
        if i % 100 == 99:
            sizes.append(process.memory_info().rss / 2**20)
    print("MiB after each 100 requests:", [round(size, 1) for size in sizes])
    assert program.end(signal.SIGTERM) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    # gradio keeps an empty queue of about 4 KB for each of the last 2,000 pages
    assert sizes[-1] - sizes[1] < 20, sizes
