"""A headless Chromium: Debian's, driven by selenium. Without one the tests here are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.browser.page import Page
from tests.support.fake_engine import small_tokenizer

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None or DRIVER is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Page]:
    """One browser for all tests."""
    assert CHROMIUM is not None and DRIVER is not None
    page = Page(CHROMIUM, DRIVER)
    yield page
    page.quit()


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    """The browser as if it were new. Whatever a test did, the page never broke its policy nor threw an error."""
    chromium.reset()
    yield chromium
    assert chromium.complaints() == []
