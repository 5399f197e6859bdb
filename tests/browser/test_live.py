"""The live view, and what both views have to be: usable on a telephone, with a keyboard, by those who do not see them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4.api.keys import hash_of, new_key
from dsv4.text.tokenizer import Tokenizer
from selenium.webdriver.common.keys import Keys

from tests.browser.page import Page
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

MIB = 2**20


class BusyEngine(FakeEngine):
    """With counts as a real one has them."""

    def stats(self) -> dict[str, Any]:
        pages = {"pages": 100, "free_pages": 40, "cached_pages": 35, "pinned_pages": 5, "snapshot_pages": 15}
        steps = {
            "steps": 70,
            "busy_us": 700_000,
            "step_measured_us": 12_000,
            "step_predicted_us": 11_000,
            "step_budget_us": 40_000,
        }
        tokens = {
            "prompt_tokens": 1000,
            "resumed_tokens": 750,
            "replayed_tokens": 20,
            "lost_history_evicted": 1234,
        }
        return {"running": 3, "waiting": 2, "parked": 1, "page_bytes": MIB, **pages, **steps, **tokens}


@pytest.fixture
def live(page: Page, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = BusyEngine(tokenizer=tokenizer)
    engine.cached_tokens = 4
    with running(engine) as server:
        page.open(server.url)
        yield server
        page.driver.get("about:blank")


def cards(page: Page) -> dict[str, str]:
    """By title, what a card says."""
    return {text.split("\n")[0]: " ".join(text.split()) for text in page.read("#cards .card")}


def test_figures(page: Page, live: RunningServer) -> None:
    page.say("What is cached of this question?")
    page.at("tab-live").click()
    page.wait(lambda: page.all("#recent tr"))
    page.wait(lambda: "–" not in cards(page)["Idle"])
    found = cards(page)
    assert found["Running"].startswith("Running 3 ") and "2 waiting · 1 parked" in found["Running"]
    assert "75%" in found["Cache hits"] and "predicted 11.0 ms, budget 40.0 ms · 70 steps" in found["Step"]
    assert "100%" in found["Idle"]
    (legend,) = page.read("#legend")
    legend = " ".join(legend.split())
    kinds = {
        "Running requests": 10,
        "Pinned prefixes": 5,
        "Cached history": 30,
        "Saved states": 15,
        "Free": 40,
    }
    assert all(
        f"{kind} {n if n >= 100 else f'{n:.1f}' if n >= 10 else f'{n:.2f}'} MiB" in legend
        for kind, n in kinds.items()
    ), legend
    (row,) = page.read("#recent tr")
    assert "seen for the first time" in row and "4" in row.split()
    (lost,), (facts,) = page.read("#lost"), page.read("#facts")
    assert "history was evicted" in lost and "1,234" in lost and "tiny" in facts
    assert page.driver.current_url.endswith("#live")
    page.reload()
    assert page.at("live").is_displayed()


def test_a_server_that_goes_away_is_told(page: Page, tokenizer: Tokenizer) -> None:
    page.expect("net::ERR_", "503")
    with running(BusyEngine(tokenizer=tokenizer)) as server:
        page.open(server.url)
        page.at("tab-live").click()
        page.wait(lambda: page.all("#cards .card"))
    page.wait(lambda: page.at("banner").is_displayed())
    assert "cannot be reached" in page.at("banner-text").text


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page: Page, live: RunningServer, width: int) -> None:
    page.resize(width, 760)
    page.say("A " + "long" * 60 + " word")
    for tab in ("tab-chat", "tab-live"):
        page.at(tab).click()
        page.wait(lambda tab=tab: tab == "tab-chat" or page.all("#cards .card"))
        assert page.js("return document.documentElement.scrollWidth") <= width
    page.js("document.getElementById('settings').showModal()")
    assert page.js("return document.getElementById('form').scrollWidth") <= width


def test_the_keyboard_is_enough(page: Page, live: RunningServer) -> None:
    page.at("say").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert page.at("say").get_attribute("value") == "one\ntwo" and not page.all("article")
    page.at("say").send_keys(Keys.ENTER)
    page.wait(lambda: page.all("article.answer"))
    page.answered()
    page.at("tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert (
        page.at("live").is_displayed()
        and page.driver.switch_to.active_element.get_attribute("id") == "tab-live"
    )
    page.at("open-settings").send_keys(Keys.ENTER)
    page.wait(lambda: page.at("settings").is_displayed())
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.at("settings").is_displayed())


def test_every_control_has_a_name(page: Page, live: RunningServer) -> None:
    page.say("Hello")
    page.js("document.getElementById('settings').show()")
    controls = {"button", "textbox", "combobox", "spinbutton", "checkbox", "tab", "link", "dialog", "log"}
    nameless, roles = [], set()
    for node in page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]:
        role = node.get("role", {}).get("value")
        if role in controls and not node.get("ignored"):
            roles.add(role)
            if not node.get("name", {}).get("value"):
                nameless.append(node)
    assert nameless == [] and {"button", "textbox", "combobox", "spinbutton", "tab", "dialog", "log"} <= roles


CONTRAST = """
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
                     return .2126 * r + .7152 * g + .0722 * b };
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c } };
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility({visibilityProperty: true}) && !e.matches('option')
  && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
  return [(a + .05) / (b + .05), e.textContent.slice(0, 40)] }).filter(([ratio]) => ratio < 4.5)"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(page: Page, live: RunningServer, dark: bool) -> None:
    page.dark(dark)
    page.say("Hello")
    for tab in ("tab-chat", "tab-live"):
        page.at(tab).click()
        page.wait(lambda tab=tab: tab == "tab-chat" or page.all("#cards .card"))
        assert page.js(CONTRAST) == []
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    page.fill(theme="light" if dark else "dark")
    assert page.js("return getComputedStyle(document.body).backgroundColor") != ground


def test_a_key_that_may_not_see_figures_is_told(page: Page, tokenizer: Tokenizer, tmp_path: Path) -> None:
    page.expect("401", "403")
    key = new_key()
    file = tmp_path / "keys.toml"
    file.write_text(f'[tenants.team]\nkeys = ["{hash_of(key)}"]\n')
    with running(BusyEngine(tokenizer=tokenizer), keys_file=str(file)) as server:
        page.open(server.url)
        page.fill(key=key)
        page.wait(lambda: not page.at("banner").is_displayed())
        page.say("Hello")
        assert page.all("article.answer")
        page.at("tab-live").click()
        page.wait(lambda: "monitor" in page.at("banner-text").text)
        page.at("tab-chat").click()
        assert not page.at("banner").is_displayed()
        page.driver.get("about:blank")
