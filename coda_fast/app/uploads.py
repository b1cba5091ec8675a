"""What browsers send: files that wait for their answer in a private folder, and the requests that are
accepted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coda_fast.data.errors import ImageError
from coda_fast.safety import printable

MOST_BYTES = 16 << 20  # of a picture or video
MOST_WAITING = 32  # uploads that no answer has deleted yet
LIFETIME = 900.0  # seconds after which such an upload is abandoned: its page was closed
_LONGEST_NAME = 80


class Uploads:
    """Files that were sent and wait to be explained, each in a folder of its own below ``folder``. Two users
    who send the same file therefore never share one.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()

    def new(self, name: str) -> Path | None:
        """The path for a new file; None if too many wait. Abandoned ones are deleted first."""
        with self._lock:
            waiting = list(self.folder.iterdir())
            for place in waiting:
                with contextlib.suppress(OSError):  # an answer may delete it meanwhile
                    if time.time() - place.stat().st_mtime > LIFETIME:
                        shutil.rmtree(place, ignore_errors=True)
            if len(list(self.folder.iterdir()) if len(waiting) >= MOST_WAITING else waiting) >= MOST_WAITING:
                return None
            place = self.folder / secrets.token_hex(16)
            place.mkdir(mode=0o700)
        # The ending alone is kept: a browser chooses the type of a video by it.
        ending = re.sub(r"[^A-Za-z0-9.]", "", Path(name).suffix)[:10]
        return place / f"upload{ending}"

    def content(self, name: str) -> bytes | None:
        """The bytes of an upload by its path below the folder; None if it is no longer there."""
        path = (self.folder / name).resolve()
        try:
            return path.read_bytes() if path.parent.parent == self.folder else None
        except OSError:
            return None

    @contextlib.contextmanager
    def opened(self, sent: dict[str, Any] | None) -> Iterator[tuple[str, Path | bytes]]:
        """The name and content of what a component of the page sent: an uploaded file, which is deleted at
        the end, or the picture that it has shown since, which it holds as a data URL.

        Raises:
            ValueError: nothing was sent, the upload is no longer there, or it is damaged.
        """
        if not sent:
            raise ValueError("Give a picture first.")
        name = printable(str(sent.get("orig_name") or "picture"))[:_LONGEST_NAME]
        if not sent.get("path"):
            yield name, _decoded(str(sent.get("url") or ""), name)
            return
        path = Path(str(sent["path"]))
        if path.parent.parent != self.folder:  # gradio has checked it, too
            raise ValueError(f"{name}: expected an upload, got another file")
        try:
            if not path.is_file():
                raise ValueError(f"{name}: expected an upload, got none; send it again")
            yield name, path
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)


def _decoded(url, name):
    if len(url) > 2 * MOST_BYTES:
        raise ImageError(f"expected at most {MOST_BYTES >> 20} MiB, got more", name)
    try:
        header, _, data = url.partition(",")
        if not re.fullmatch(r"data:[\w.+/-]*;base64", header):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise ImageError("expected a picture, got other data; send it again", name) from None


# All that the page asks for; gradio serves much more. Its other ways to send files run other decoders.
_READ = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*"
    r"|gradio_api/(info|startup-events|queue/data|heartbeat/[^/]+|file=.*))"
)
_SENT = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)")
_UPLOAD = "/gradio_api/upload"


class Guard:
    """The first ASGI application that a request meets. It refuses paths that the page does not use and bodies
    that are too large, and receives uploads.
    """

    def __init__(self, app: Callable, uploads: Uploads):
        self.app, self.uploads = app, uploads
        self._files = f"/gradio_api/file={uploads.folder}/"

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        """Answer one request, or pass it on."""
        from starlette.responses import JSONResponse, PlainTextResponse, Response

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        method, path = scope["method"], scope["path"]
        answer: Any
        if method == "GET" and path.startswith(self._files):
            # The page shows an upload until it is answered, which may be at this moment. A browser recognises
            # pictures and videos by their content; anything else it does not open.
            content = self.uploads.content(path.removeprefix(self._files))
            answer = PlainTextResponse("not here", 404) if content is None else Response(content)
        elif method in ("GET", "HEAD") and _READ.fullmatch(path):
            answer = self.app
        elif method == "GET" and path == f"{_UPLOAD}_progress":  # an upload to this computer takes no time
            answer = PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        elif method == "POST" and _SENT.fullmatch(path):
            # The server holds a body to the length that its header states.
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                answer = PlainTextResponse("expected a Content-Length", 411)
            # a picture that is shown comes back in base64
            elif int(length) > (MOST_BYTES + (1 << 16) if path == _UPLOAD else 2 * MOST_BYTES):
                answer = PlainTextResponse(f"expected at most {MOST_BYTES >> 20} MiB", 413)
            elif path == _UPLOAD:
                status, content = await self._receive(scope, receive)
                answer = (
                    JSONResponse(content, status) if status == 200 else PlainTextResponse(content, status)
                )
            else:
                answer = self.app
        else:
            answer = PlainTextResponse("not here", 404)
        await answer(scope, receive, send)

    async def _receive(self, scope, receive):
        """Status and content of the answer to an upload: the path of the file, as gradio gives it."""
        from anyio import to_thread
        from starlette.datastructures import UploadFile
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request

        try:
            async with Request(scope, receive).form(max_files=1, max_fields=1) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    return 400, "expected one file"
                path = self.uploads.new(file.filename or "")
                if path is None:
                    return 503, "too many uploads wait; try again soon"
                with open(path, "wb") as copy:
                    await to_thread.run_sync(shutil.copyfileobj, file.file, copy)
                return 200, [str(path)]
        except (HTTPException, ClientDisconnect) as error:
            return 400, str(getattr(error, "detail", "expected one file"))
