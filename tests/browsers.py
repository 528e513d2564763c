"""A Chromium for the tests of pages, and readers that watch what a page says and asks for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def watch(page) -> SimpleNamespace:
    """The page with what it says on the console and asks the browser for."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    return SimpleNamespace(page=page, said=said, asked=asked)


class Browser:
    """A running Chromium."""

    def __init__(self, running) -> None:
        self.running = running

    @contextmanager
    def reading(self, path: Path) -> Iterator[SimpleNamespace]:
        """A file, opened, and watched from before it was."""
        context = self.running.new_context()
        try:
            reader = watch(context.new_page())
            reader.page.goto(path.as_uri())
            yield reader
        finally:
            context.close()


@contextmanager
def chromium() -> Iterator:
    """Playwright's handle of an installed Chromium; skips the test without one."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path)
        yield running
        running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield Browser(running)
