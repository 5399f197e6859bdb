"""The chat of the page in a real browser: answers, thoughts, calls, stopping, settings, the key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from dsv4.text.tokenizer import Tokenizer
from selenium.webdriver.common.by import By

from tests.browser.page import Page
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Ulm</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


@pytest.fixture
def serve(tokenizer: Tokenizer, page: Page) -> Iterator[Callable[..., RunningServer]]:
    """Serves an answer, or what a function says to a prompt's text, and opens the page."""
    opened = []

    def start(answer: str | Callable[[str], str], step: float = 0.0, **settings: object) -> RunningServer:
        def script(prompt: Sequence[int]) -> str:
            return (
                answer
                if isinstance(answer, str)
                else answer(tokenizer.decode(list(prompt), skip_special=False))
            )

        engine = FakeEngine(script, tokenizer=tokenizer, step_seconds=step)
        server = running(engine, name="small", **settings)
        opened.append(server)
        found = server.__enter__()
        page.open(found.url)
        return found

    yield start
    page.driver.get("about:blank")
    for server in opened:
        server.__exit__(None, None, None)


def test_an_answer_comes_and_stays(serve: Callable[..., RunningServer], page: Page) -> None:
    serve("Hello **you**, here is `code`.\n\n1. one\n2. two\n")
    assert page.at("model").text == "small" and page.driver.title == "small · dsv4"
    page.say("Hi <b>there</b>")
    assert page.text("article.user p") == "Hi <b>there</b>"
    assert page.text(".answer strong") == "you" and page.text(".answer :not(pre) > code") == "code"
    assert [li.text for li in page.all(".answer ol > li")] == ["one", "two"]
    assert "tokens" in page.text(".answer footer") and "from the cache" in page.text(".answer footer")
    page.reload()
    assert page.text(".answer strong") == "you"
    page.at("new").click()
    assert not page.all("article") and page.at("try").is_displayed()
    assert page.outside() == []


def test_thoughts_stand_apart(serve: Callable[..., RunningServer], page: Page) -> None:
    server = serve("I weigh it.</think>It is so.")
    page.fill(effort="high")
    page.say("Is it so?")
    assert page.text(".answer > .markdown") == "It is so."
    thoughts = page.all(".answer details")[0]
    assert thoughts.get_attribute("open") is None and thoughts.text.startswith("Thought")
    assert thoughts.find_element(By.CSS_SELECTOR, ".markdown").get_attribute("textContent") == "I weigh it."
    assert server.engine.seen[-1].reading.thinking


def test_a_call_is_shown_and_its_result_goes_back(serve: Callable[..., RunningServer], page: Page) -> None:
    server = serve(lambda prompt: "It rains." if "tool_result" in prompt else CALL)
    page.js("document.getElementById('settings').showModal()")
    page.at("example").click()
    assert page.at("tools-note").text == "get_weather"
    page.at("close-settings").click()
    page.say("The weather in Ulm?")
    assert page.text(".call h3") == "calls get_weather" and page.text(".call pre") == '{\n  "city": "Ulm"\n}'
    page.all(".results textarea")[0].send_keys("rain, 9 degrees")
    page.all(".results button")[0].click()
    page.wait(lambda: len(page.all("article.answer")) == 2)
    page.answered()
    assert page.text(".answer > .markdown") == "It rains."
    assert page.text("article.tool pre") == "rain, 9 degrees" and not page.all(".results")
    assert len(server.engine.seen) == 2


def test_stopping_aborts_the_request(serve: Callable[..., RunningServer], page: Page) -> None:
    server = serve("word " * 2000, step=0.02)
    page.begin("Go on")
    page.wait(lambda: "word word" in page.text(".answer > .markdown"))
    assert page.at("send").text == "Stop"
    page.at("send").click()
    page.answered()
    page.wait(lambda: server.engine.live == 0)
    assert server.engine.aborted == 1
    assert "stopped" in page.text(".answer footer") and page.at("send").text == "Send"
    page.all(".answer footer button")[-1].click()  # try again
    page.wait(lambda: len(server.engine.seen) == 2)
    assert server.engine.seen[0].prompt == server.engine.seen[1].prompt
    page.at("new").click()
    page.wait(lambda: server.engine.live == 0)


def test_settings_are_sent_and_kept(serve: Callable[..., RunningServer], page: Page) -> None:
    server = serve("fine")
    page.fill(
        system="You are a pirate.", temperature="0.25", top_p="0.5", top_k="7", max_tokens="3", seed="11"
    )
    page.say("Hello")
    params = server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (
        0.25,
        0.5,
        7,
        3,
        11,
    )
    assert "pirate" in server.engine.tokenizer.decode(server.engine.seen[-1].prompt)
    assert "temperature 0.25" in page.at("summary").text and "system text" in page.at("summary").text
    page.reload()
    assert page.at("temperature").get_attribute("value") == "0.25"
    page.fill(tools="[{]")
    assert page.js("return document.getElementById('tools-note').textContent").startswith("Not used: no JSON")
    page.fill(temperature="9")
    page.expect("400")
    page.say("Hello")
    assert "temperature" in page.text(".answer .error")


def test_a_question_can_be_asked_otherwise(serve: Callable[..., RunningServer], page: Page) -> None:
    server = serve("fine")
    page.say("First")
    page.say("Second")
    page.all("article.user .actions button")[0].click()
    assert page.at("say").get_attribute("value") == "First" and not page.all("article")
    page.say(" again")
    assert len(page.all("article")) == 2
    assert "Second" not in server.engine.tokenizer.decode(server.engine.seen[-1].prompt)


def test_a_failing_generation_keeps_what_came(page: Page, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: "one two three four", tokenizer=tokenizer, fail_after=3)
    with running(engine) as server:
        page.open(server.url)
        page.say("Go")
        assert "one two" in page.text(".answer > .markdown") and "boom" in page.text(".answer .error")
        page.driver.get("about:blank")


def test_the_key(serve: Callable[..., RunningServer], page: Page) -> None:
    page.expect("401")
    serve("secret answer", api_key="sesame")
    assert page.at("banner").is_displayed() and "key" in page.at("banner-text").text
    page.at("banner-key").click()
    page.fill(key="wrong")
    page.wait(lambda: page.at("banner").is_displayed())
    page.fill(key="sesame")
    page.wait(lambda: not page.at("banner").is_displayed())
    page.at("close-settings").click()
    page.say("Hello")
    assert page.text(".answer > .markdown") == "secret answer"
    kept = "return JSON.stringify([sessionStorage, localStorage])"
    session, local = page.js(f"{kept.replace('return', 'const k =')}; return JSON.parse(k)")
    assert session["dsv4.key"] == "sesame" and "sesame" not in str(local)
    page.at("tab-live").click()
    page.wait(lambda: page.all("#cards .card"))


def test_answers_to_an_older_key_are_ignored(serve: Callable[..., RunningServer], page: Page) -> None:
    """A slow no to the first key comes after the yes to the second one."""
    page.expect("401")
    serve("secret answer", api_key="sesame")
    page.js(
        "const real = window.fetch; window.held = [];"
        "window.fetch = async (path, init) => {"
        "  const answer = await real(path, init);"
        "  if (path !== 'v1/models' || init.headers.authorization !== 'Bearer wrong') return answer;"
        "  const said = await answer.json();"
        "  answer.json = async () => { setTimeout(() => { window.over = true; }); return said; };"
        "  await new Promise((go) => window.held.push(go));"
        "  return answer;"
        "}"
    )
    page.fill(key="wrong")
    page.wait(lambda: page.js("return window.held.length") == 1)
    page.fill(key="sesame")
    page.wait(lambda: not page.at("banner").is_displayed())
    page.js("window.held[0]()")
    page.wait(lambda: page.js("return window.over"))
    assert not page.at("banner").is_displayed() and page.at("model").get_attribute("value") == "small"
