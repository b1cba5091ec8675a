"""Requests to the web page, also such as no browser would send."""

import base64
import concurrent.futures
import contextlib
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support_app import User, encoded, film

from coda_fast import viewer
from coda_fast.app import page as pages
from coda_fast.app import uploads
from coda_fast.data.photographs import example_photographs

# Once is enough: a release of torch changes nothing in the browser.
pytestmark = pytest.mark.slow


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
