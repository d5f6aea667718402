"""One governor under load and one browser for all tests of a file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.browser.stage import Stage, stage
from tests.conftest import build, missing
from tests.dashboard import TOKEN

ARGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not on PATH: apt-get install chromium, or your system's way")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=list(ARGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def running(browser: Browser) -> Iterator[Stage]:
    with (
        TemporaryDirectory(prefix="governor-") as home,
        build("valkey", appendonly=True) as server,
        stage(Path(home), server) as one,
    ):
        yield one


@pytest.fixture
def desk(running: Stage) -> Stage:
    """The governor, ARMED."""
    running.arm()
    return running


@pytest.fixture
def visit(browser: Browser, desk: Stage) -> Iterator[Callable[..., Page]]:
    """Open the page as `visit(url, **context options)`. What it did wrong meanwhile fails the test at its end.

    `title`: what it has to contain before the test goes on.
    `refusals=True`: answers other than 200 are part of the test; the browser tells of each on the console.
    """
    contexts, wrong = [], []

    def open_page(url: str | None = None, *, refusals: bool = False, title: str = "^[●◐■]", **options: Any) -> Page:
        base = url or desk.dashboard.url
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 1280}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)

        def console(message: ConsoleMessage) -> None:
            if message.type not in ("error", "warning"):
                return
            if not (refusals and message.text.startswith("Failed to load resource")):
                wrong.append(f"console: {message.text}")

        def request(asked: Request) -> None:
            if not asked.url.startswith(f"{base}/"):
                wrong.append(f"asked outside: {asked.url}")

        page.on("console", console)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", request)
        page.goto(base)
        expect(page).to_have_title(re.compile(title))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


def log_in(page: Page, token: str = TOKEN) -> None:
    page.click("#login")
    page.fill("#login-token", token)
    page.click("#login-form button[type=submit]")
    if token == TOKEN:
        expect(page.locator("#disarm")).to_be_visible()
