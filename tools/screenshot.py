"""The picture of the app in the README:

    python -m tools.screenshot

Serves the page with the networks of the package, chooses one of its example photographs, and photographs it
in a headless Chromium, which must be installed (Debian: apt install chromium).
"""

from __future__ import annotations

import argparse
import shutil
import socket
from pathlib import Path

from playwright.sync_api import sync_playwright

from coda_fast import app, pretrained

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "app.png"
WIDTH, HEIGHT = 1200, 1090


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="coda_xs_imagenette", choices=pretrained.names())
    parser.add_argument("--example", type=int, default=3, help="the number of the photograph, from 0")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    networks = {name: pretrained.load(name) for name in pretrained.names()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with app.running(networks, arguments.network, port=port) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.locator("#coda-examples button").nth(arguments.example).click()
        page.wait_for_selector('.coda-viewer[data-started="drawn"]', timeout=60_000)
        page.wait_for_timeout(1000)  # animations of the page
        page.screenshot(path=arguments.output)
        browser.close()
    print(arguments.output)


if __name__ == "__main__":
    main()
