"""Servers and browsers for the tests of the web page."""

import os
import time
from pathlib import Path

import pytest
from support_app import BROWSER, FLAGS, PATIENCE, User, free_port, network

from coda_fast import app


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


@pytest.fixture(scope="module")
def user(server):
    return User(server)
