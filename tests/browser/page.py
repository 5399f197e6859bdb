"""The page as its users have it: what they click, type and see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 120
"""Seconds for what should come at once: the machine may be busy."""
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Page:
    """One window."""

    def __init__(self, chromium: str, driver: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self._origin = ""
        self._expected: tuple[str, ...] = ()

    def quit(self) -> None:
        self.driver.quit()

    def reset(self) -> None:
        """Forgets everything, and has the size of a laptop's window."""
        if self._origin:
            self.driver.execute_cdp_cmd(
                "Storage.clearDataForOrigin", {"origin": self._origin, "storageTypes": "all"}
            )
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self._expected = ()
        self.resize(1280, 860)
        self.dark(False)

    def open(self, url: str) -> None:
        """Opens the page, and waits until it knows the model's name."""
        self._origin = url
        self.driver.get(url + "/")
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.driver.refresh()
        self.wait(lambda: self.at("status").text or self.at("banner").is_displayed())

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def dark(self, on: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def at(self, id: str) -> WebElement:
        return self.driver.find_element(By.ID, id)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """Of the last one of these."""
        return self.all(css)[-1].text

    def read(self, css: str) -> list[str]:
        """The text of all of these, at one moment: the live view makes them anew every second."""
        found: list[str] = self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", css
        )
        return found

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, until: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: until())

    def begin(self, text: str) -> None:
        """Sends a message."""
        self.at("say").send_keys(text)
        self.at("send").click()
        self.wait(lambda: self.all("article.answer"))

    def say(self, text: str) -> None:
        """Sends a message and waits for the whole answer."""
        self.begin(text)
        self.answered()

    def answered(self) -> None:
        self.wait(lambda: self.at("turns").get_attribute("aria-busy") == "false")

    def fill(self, **values: str) -> None:
        """Sets fields by their ids, as typing does."""
        for id, value in values.items():
            self.js(
                "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, {bubbles: true}))",
                id,
                value,
            )

    def render(self, source: str) -> str:
        """Markdown as the page's renderer makes it, as HTML."""
        html: str = self.driver.execute_async_script(
            "const done = arguments[1]; import('./page/markdown.js').then(({show}) => {"
            "const node = document.createElement('div'); show(node, arguments[0]); done(node.innerHTML); })",
            source,
        )
        return html

    def outside(self) -> list[str]:
        """Addresses that the page has fetched something from and that are not its server's."""
        found: list[str] = self.js(
            "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
        )
        return found

    def expect(self, *parts: str) -> None:
        """Complaints with these parts are what the test is about."""
        self._expected = parts

    def complaints(self) -> list[str]:
        """What the browser logged: errors, and what the content security policy held back."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
            and not any(p in entry["message"] for p in self._expected)
        ]
