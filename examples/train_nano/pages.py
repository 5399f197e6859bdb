"""Documentation pages as blocks of text, without what surrounds the text on every page."""

from __future__ import annotations

import hashlib
import html.parser
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sources import Source, read_files


class Block(NamedTuple):
    """`kind`: `h` heading, `p` paragraph, `pre` verbatim."""

    kind: str
    text: str


_BREAKS = set(
    "p li dt dd h1 h2 h3 h4 td th tr div section table ul ol blockquote article".split()  # noqa: SIM905
)
_SKIPPED = set(["script", "style", "nav", "head", "footer", "svg", "button", "form", "select"])
_VOID = set(["br", "img", "hr", "input", "meta", "link", "col", "wbr", "area", "base"])
_FURNITURE = re.compile(
    r"(?:^|\s)(?:sphinxsidebar|related|toctree|navheader|navfooter|footer|sidebar|leftnav|nav|mobile|menu|toc\b|breadcrumb|version"
    r"|search|wy-nav-side|wy-menu|fixed-sidebar|docs-(?:top|version|sidebar|narrow))",
    re.I,
)


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._kind, self._verbatim = "p", 0
        self._skipping: list[str] = []

    def flush(self, kind: str = "p") -> None:
        text = "".join(self._text)
        text = text.rstrip() if self._verbatim else re.sub(r"\s+", " ", text).strip()
        if text.strip():
            self.blocks.append(Block("pre" if self._verbatim else self._kind, clean(text)))
        self._text, self._kind = [], kind

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br":
                self._text.append("\n" if self._verbatim else " ")
            return
        of = dict(attrs)
        names = f"{of.get('class') or ''} {of.get('id') or ''}" if tag in ("div", "ul", "p") else ""
        headerlink = tag == "a" and "headerlink" in (of.get("class") or "")
        if self._skipping or tag in _SKIPPED or headerlink or _FURNITURE.search(names):
            self._skipping.append(tag)
        elif tag == "pre":
            self.flush()
            self._verbatim += 1
        elif tag in _BREAKS and not self._verbatim:
            self.flush("h" if tag[0] == "h" else "p")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
        elif tag == "pre" and self._verbatim:
            self.flush()
            self._verbatim -= 1
        elif tag in _BREAKS and not self._verbatim:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)


def clean(text: str) -> str:
    """ASCII, Latin and common punctuation; typographic quotes become plain ones."""
    for a, b in (("\u00a0", " "), ("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("¶", "")):
        text = text.replace(a, b)
    return re.sub(r"[^\x09\x0a\x20-\x7e\u00a1-\u024f\u2013\u2014\u2022\u2026]", "", text)


def blocks_of(path: Path, raw: str) -> list[Block]:
    """Blocks of an HTML or Perl page, of a Python file, a dictionary or a book, or of the comments in a Go file."""
    if path.suffix in (".pod", ".go", ".txt"):
        return {".pod": _pod, ".go": _go, ".txt": _book}[path.suffix](clean(raw))
    if path.suffix == ".py":
        return [Block("pre", b) for b in re.split(r"\n\n\n+", clean(raw))]
    if path.suffix == ".dz":
        entries = re.split(r"\n(?=\S)", clean(raw))
        return [Block("p", re.sub(r"\s+", " ", e).strip()) for e in entries]
    reader = _Reader()
    try:
        reader.feed(raw)
        reader.flush()
    except AssertionError:  # html.parser on broken markup
        return []
    return reader.blocks


def _pod(raw: str) -> list[Block]:
    out: list[Block] = []
    for text in re.split(r"\n\s*\n", raw):
        if text[:1] in (" ", "\t"):
            out.append(Block("pre", text.rstrip()))
            continue
        text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", re.sub(r"\s+", " ", text).strip())
        text = re.sub(r"E<(lt|gt)>", lambda m: "\1" if m[1] == "lt" else "\2", text)
        for _ in range(3):
            text = re.sub(r"L<([^<>|]*)(?:\|[^<>]*)?>|[A-KM-Z]<([^<>]*)>", lambda m: m[1] or m[2] or "", text)
        text = text.replace("\1", "<").replace("\2", ">")
        if text.startswith("=head"):
            out.append(Block("h", text.partition(" ")[2]))
        elif text.startswith("=item"):
            out.append(Block("p", text.partition(" ")[2].lstrip("* ")))
        elif text and text[0] != "=":
            out.append(Block("p", text))
    return [b for b in out if b.text]


def _go(raw: str) -> list[Block]:
    """Comments of 200 letters or more, as paragraphs; what is indented in them stays as it is."""
    out = []
    for comment in re.findall(r"(?:^//.*\n)+", raw, re.M):
        lines = [line[2:].removeprefix(" ") for line in comment.splitlines()]
        if len(comment) > 200 and "All rights reserved" not in comment:
            for text in re.split(r"\n\s*\n", "\n".join(lines)):
                verbatim = any(line[:1] in (" ", "\t") for line in text.splitlines())
                out.append(Block("pre", text) if verbatim else Block("p", re.sub(r"\s+", " ", text).strip()))
    return [b for b in out if b.text]


def _book(raw: str) -> list[Block]:
    return [Block("p", re.sub(r"\s+", " ", t).strip()) for t in re.split(r"\n\s*\n", raw)]


def _key(text: str) -> bytes:
    """The same for texts that differ in numbers, case and marks alone."""
    return hashlib.md5(re.sub(r"[\W\d]+", "", text.lower()).encode()).digest()[:8]


def _mostly_no_words(text: str) -> bool:
    return len(text) < 200 and sum(c.isalpha() or c == " " for c in text) < 0.5 * len(text)


def documents(source: Source, debs: Path, seen: set[bytes]) -> tuple[list[str], list[tuple[str, str]]]:
    """Texts of the package, and (heading, first paragraph) pairs. Long blocks are kept once over all
    packages (`seen`); short ones that many pages have or one page often, and lists of versions, are page furniture."""
    pages = []
    for path, raw in read_files(source, debs):
        pages.append(blocks_of(path, raw))
        if sum(len(b.text) for page in pages[-1:] for b in page) == 0:
            pages.pop()
    on_pages = Counter(k for page in pages for k in {_key(b.text) for b in page if len(b.text) <= 60})
    most = max(3, len(pages) // 50)
    texts, pairs, size = [], [], 0
    for page in pages:
        kept: list[str] = []
        heading: str | None = None
        cells = Counter(_key(b.text) for b in page if b.kind == "p" and len(b.text) <= 60)
        for kind, text in page:
            key = _key(text)
            if kind == "h":
                heading = re.sub(r"^[\d.]+\s*", "", text)
            if len(text) > 30 and key in seen:
                continue
            if kind != "pre" and (on_pages[key] > most or cells[key] > 3 or _mostly_no_words(text)):
                continue
            if kind == "pre" and len(text) > 300 and repetitive(text):
                continue
            seen.add(key)
            if kind == "p" and heading and _defines(heading, text):
                pairs.append((heading, text))
                heading = None
            kept.append(f"\n{text}\n" if kind == "h" else text)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
        if len(text) > 400 and not repetitive(text):
            texts.append(text)
            size += len(text)
        if size > source.megabytes * 1e6:
            break
    return texts, pairs


def repetitive(text: str, words: int = 6, most: float = 0.2) -> bool:
    """More than a fifth of the text is there before: of its runs of six words too many are not the first."""
    found = re.findall(r"[A-Za-z]+", text)
    runs = Counter(tuple(found[i : i + words]) for i in range(len(found) - words + 1))
    return runs.total() - len(runs) > most * max(1, runs.total())


def _defines(heading: str, text: str) -> bool:
    """A first paragraph that can answer "What is HEADING?"."""
    return (
        60 < len(text) < 420
        and text[0].isupper()
        and text[-1] == "."
        and 3 < len(heading) < 50
        and "?" not in heading
        and heading[0].isalpha()
        and heading not in ("Description", "Parameters", "Notes", "Examples", "Changes", "Usage")
    )
