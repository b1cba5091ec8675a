"""The pictures of the README and of docs/evaluation.md that a person would otherwise take by hand:

    python -m tools.pictures

docs/demo.png is what ``coda-fast demo`` draws; docs/app.png and docs/report.png show the app and a report in
a headless Chromium, which must be installed (Debian: apt install chromium).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from coda_fast import app, pretrained, report
from coda_fast.data import digits
from coda_fast.demo import photographs

DOCS = Path(__file__).resolve().parent.parent / "docs"
STARTED = '.coda-viewer[data-started="drawn"]'
# the number of an example photograph in the app, and of a test image of the digits
PHOTOGRAPH, DIGIT = 3, 50
# the corners of a box, in pixels of the digit: an 8 is closed there on its left side
BOX = (1, 2), (3, 5)


def main() -> None:
    """Take all pictures, or those that are named."""
    takers = {"demo": of_demo, "app": of_app, "report": of_report}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(takers)}; default: all")
    parser.add_argument("--output", type=Path, default=DOCS, help="the folder")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(takers):
        parser.error(f"names: expected {', '.join(takers)}, got {', '.join(sorted(unknown))}")
    for name in arguments.names or takers:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{name}.png"
        takers[name](path)
        print(path)


def of_demo(path: Path) -> None:
    """The figure of ``coda-fast demo``."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(photographs.run(folder).figure, path)


def of_app(path: Path) -> None:
    """The app with the networks of the package and one of its example photographs."""
    networks = {name: pretrained.load(name) for name in pretrained.names()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with app.running(networks, port=port) as address, chromium(1200, 1090) as page:
        page.goto(address)
        page.locator("#coda-examples button").nth(PHOTOGRAPH).click()
        page.wait_for_selector(STARTED, timeout=60_000)
        page.wait_for_timeout(1000)  # animations of the page
        page.screenshot(path=path)


def of_report(path: Path) -> None:
    """A report on a digit: why it is a 3 and not an 8, and what the pixels in a box give."""
    name, image = "coda_xs_digits", digits.digit_tensors().test_images[DIGIT]
    shown = report.Picture("3.png", image, network=name)
    text = "".join(report.stream({name: pretrained.load(name)}, [shown]))
    with tempfile.TemporaryDirectory() as folder, chromium(1200, 1150) as page:
        file = Path(folder, "report.html")
        file.write_text(text, encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_selector(STARTED)
        page.get_by_label("and not", exact=True).select_option("8")
        corners = page.locator(".coda-main canvas").bounding_box()
        (left, top), (right, bottom) = (
            (
                corners["x"] + corners["width"] * (x + 0.5) / 8,
                corners["y"] + corners["height"] * (y + 0.5) / 8,
            )
            for x, y in BOX
        )
        page.mouse.move(left, top)
        page.mouse.down()
        page.mouse.move(right, bottom)
        page.mouse.up()
        page.mouse.move(0, 0)
        print(page.locator(".coda-reading").inner_text(), page.locator(".coda-proof").inner_text())
        page.screenshot(path=path)


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[Page]:
    """An empty page of a headless browser."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


if __name__ == "__main__":
    main()
