"""A real Chromium with its network off; tests that want one are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator:
    """A running browser, found on the path or named by HIJACKLENS_CHROMIUM."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("HIJACKLENS_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with api.sync_playwright() as playwright:
        # A container's root may not have the sandbox; the pages are our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page in a context of its own, offline, with what it said and asked for."""

    def __init__(self, browser, path: Path, **options) -> None:
        options = {"viewport": {"width": 1366, "height": 768}, **options}
        self.context = browser.new_context(offline=True, accept_downloads=True, **options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context.set_default_timeout(5_000)
        address = path.resolve().as_uri()
        self.context.route("**/*", lambda route: self._route(route, address))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]", timeout=20_000)

    def _route(self, route, address: str) -> None:
        if route.request.url.split("#")[0] == address:
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def _dialog(self, dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_) -> None:
        self.context.close()
