"""A web page on this computer to look at explanations: ``coda-fast app``.

The page asks for nothing outside this computer, and what it is given is deleted with the answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from coda_fast.network import Network

__all__ = ["PORT", "build", "running", "serve"]

HOST = "127.0.0.1"
PORT = 7860


def build(networks: Mapping[str, Network], default: str | None = None) -> Any:
    """The page as a ``gradio.Blocks``, to be started by ``running`` or ``serve``.

    Args:
        networks: name: network, at least one. They are set to evaluation mode.
        default: the name of the network that is chosen at first; None: the first, or, if all networks of the
            package are there, the one for the size of the picture.

    Its attribute ``folder`` is a private temporary folder for what is sent; it is deleted with the page.

    Raises:
        ImportError: gradio is missing.
        ValueError: there are no networks, or ``default`` is none of them.
        TypeError: one of them is not a network.
    """
    from coda_fast.app import page
    from coda_fast.app.uploads import Uploads

    if not networks:
        raise ValueError("networks: expected at least one, got none")
    known = page.choices(networks)
    default = known[0] if default is None else default
    if default not in known:
        raise ValueError(f"default: expected one of {', '.join(known)}, got {default!r}")
    for name, model in networks.items():
        if not isinstance(model, Network):
            raise TypeError(f"networks: {name}: expected a coda_fast.Network, got a {type(model).__name__}")
        model.eval()
    folder = tempfile.TemporaryDirectory(prefix="coda_fast_app_")
    try:
        uploads = Uploads(Path(folder.name) / "uploads")
        with _environment(folder.name):
            found = page.blocks(networks, default, uploads)
    except BaseException:
        folder.cleanup()
        raise
    found.folder, found.uploads = folder, uploads
    return found


@contextlib.contextmanager
def running(
    networks: Mapping[str, Network], default: str | None = None, *, host: str = HOST, port: int = PORT
) -> Iterator[str]:
    """Within it, the page is served at the address that it gives.

    Args:
        networks, default: as in ``build``.
        host: the address of this computer at which the page can be reached; by default only from itself.
        port: a free one.

    Raises:
        ImportError, ValueError, TypeError: as ``build``.
        OSError: the port is taken, or the host is not of this computer.
    """
    page = build(networks, default)
    with page.folder, _environment(page.folder.name):
        address = _launch(page, host, port)
        try:
            yield address
        finally:
            _close(page)


def serve(
    networks: Mapping[str, Network],
    default: str | None = None,
    *,
    host: str = HOST,
    port: int = PORT,
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the page until the program is interrupted (Ctrl-C). ``ready`` is called with its address. The
    other arguments and the errors are those of ``running``.
    """
    with running(networks, default, host=host, port=port) as address, contextlib.suppress(KeyboardInterrupt):
        ready(address)
        Event().wait()


def _launch(page, host, port):
    import gradio as gr
    from starlette.middleware import Middleware

    from coda_fast import viewer
    from coda_fast.app.page import CSS
    from coda_fast.app.uploads import MOST_BYTES, Guard

    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],  # many themes take theirs from another server
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,  # of a bug, the page says nothing; the terminal shows it
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=MOST_BYTES,
            # gradio keeps the last values of as many pages, for links that this page does not offer
            state_session_capacity=1,
            app_kwargs={"middleware": [Middleware(Guard, uploads=page.uploads)]},
            theme=theme,
            css=CSS,
            head=viewer.head(),
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise OSError(f"port: expected a free one, got {port}, which is taken or not permitted") from None
    return address


def _close(page):
    """Stop the server. Open pages hold connections that do not end: they are cut, with no word in the log."""
    log = logging.getLogger("uvicorn.error")
    before, log.disabled = log.disabled, True
    page.server.config.timeout_graceful_shutdown = 1  # seconds
    try:
        page.close(verbose=False)
        page.answers.end()
    finally:
        log.disabled = before


@contextlib.contextmanager
def _environment(folder):
    """Within it, gradio takes no settings from the environment but these. It reads some of them when it makes
    a page, others at each request.
    """
    settings = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # statistics of requests, which it computes anew after each
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": f"{HOST},localhost",  # it asks the page for its state, which no proxy can answer
        "no_proxy": f"{HOST},localhost",
    }
    others = [name for name in os.environ if name.startswith("GRADIO_")]
    before = {name: os.environ.get(name) for name in (*settings, *others)}
    for name in others:
        del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
