"""Where the text comes from: Debian packages of permissively licensed documentation, as `apt-get download` gives them."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Source:
    """`pattern` says which files of the package are read, `megabytes` how much of its text is kept at most."""

    package: str
    licence: str
    pattern: str
    megabytes: float


SOURCES = (
    Source(
        "python3.11-doc",
        "PSF-2.0",
        r"html/(tutorial|library|howto|reference|faq|using|glossary|whatsnew|distutils|extending)",
        11,
    ),
    Source(
        "rust-doc",
        "MIT OR Apache-2.0",
        r"html/(book|rust-by-example|reference|nomicon|cargo|edition-guide|rustc|rustdoc|unstable-book|embedded-book)/",
        6,
    ),
    Source("postgresql-doc-15", "PostgreSQL", r"\.html$", 8),
    Source("python-django-doc", "BSD-3-Clause", r"html/(topics|ref|howto|intro|faq|misc|internals)", 6),
    Source("sqlite3-doc", "public domain", r"\.html$", 6),
    Source("python-sqlalchemy-doc", "MIT", r"html/(orm|core|dialects|tutorial|faq|glossary)", 4),
    Source("twisted-doc", "MIT", r"\.html$", 3),
    Source("python-pandas-doc", "BSD-3-Clause", r"html/(user_guide|getting_started|development)", 2),
    Source("python-tornado-doc", "Apache-2.0", r"\.html$", 1),
    Source("python-aiohttp-doc", "Apache-2.0", r"\.html$", 1),
    Source("python-requests-doc", "Apache-2.0", r"\.html$", 1),
    Source("python-flask-doc", "BSD-3-Clause", r"\.html$", 1),
    Source("python-click-doc", "BSD-3-Clause", r"\.html$", 1),
    Source("python-werkzeug-doc", "BSD-3-Clause", r"\.html$", 1),
    Source("python-jinja2-doc", "BSD-3-Clause", r"\.html$", 1),
    Source("sphinx-doc", "BSD-2-Clause", r"\.html$", 2),
    Source("cmake-doc", "BSD-3-Clause", r"\.html$", 3),
    Source("nodejs-doc", "MIT", r"api/.*\.html$", 3),
    Source("apache2-doc", "Apache-2.0", r"/en/.*\.html$|\.html\.en$", 4),
    Source("llvm-14-doc", "Apache-2.0 WITH LLVM-exception", r"html/[A-Za-z]+\.html$", 3),
    Source("clang-14-doc", "Apache-2.0 WITH LLVM-exception", r"\.html$", 2),
    Source(
        "perl-doc", "Artistic OR GPL-1.0-or-later", r"pod/perl(?!\d|delta|hist|modlib|toc)[a-z0-9]+\.pod$", 6
    ),
    Source("golang-1.19-src", "BSD-3-Clause", r"src/[^.]*\.go$|testdata/Isaac\.Newton-Opticks\.txt$", 8),
    Source("libboost1.74-doc", "BSL-1.0", r"html/(?!boost/).*\.html$", 5),
    Source(
        "erlang-doc",
        "Apache-2.0",
        r"/doc/[a-z_]*(guide|principles|manual|started|examples|tutorial)/|_chapter|guide\.html$",
        4,
    ),
    Source(
        "python-sklearn-doc",
        "BSD-3-Clause",
        r"html/(stable/)?(modules/[a-z_]+|tutorial.*|developers.*|[a-z_]+)\.html$",
        2,
    ),
    Source("python-scipy-doc", "BSD-3-Clause", r"html/(tutorial|dev|building|[a-z_]+\.html)", 1),
    Source("zsh-doc", "MIT-like (Zsh)", r"\.html$", 1.5),
    Source("abs-guide", "public domain", r"\.html$", 2),
    Source("libpython3.11-stdlib", "PSF-2.0", r"\.py$", 4),
    Source("dict-devil", "public domain", r"devil\.dict\.dz$", 1),
    Source("dict-jargon", "public domain", r"jargon\.dict\.dz$", 2),
)
WORDNET = Source("wordnet-base", "WordNet 3.0", r"share/wordnet/(data|index)\.", 4)

_UNWANTED = re.compile(
    r"genindex|py-modindex|search\.html|/test|bookindex|print\.html|changelog|_modules|pydoc_data|encodings/|/idlelib/|sitemap|quickreference|_test\.go|/vendor/|zgoos|ztables|auto_examples"
)
_LARGEST = 1_500_000


def download(folder: Path) -> None:
    """Fetches the packages that are not there yet. Needs apt with a Debian 12 archive."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s.package for s in (*SOURCES, WORDNET) if not list(folder.glob(f"{s.package}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=folder, check=True)


def unpack(source: Source, debs: Path) -> Path:
    """The package's files, extracted once."""
    found = sorted(debs.glob(f"{source.package}_*.deb"))
    if not found:
        raise SystemExit(f"{source.package} is not in {debs}; run with --download")
    root = debs / "unpacked" / source.package
    if not root.exists():
        root.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg", "-x", found[-1], root], check=True)
    return root


def read_files(source: Source, debs: Path) -> Iterator[tuple[Path, str]]:
    """(path, text) of the files that are read, in an order that a seed fixes."""
    root = unpack(source, debs)
    files = sorted(
        p
        for p in root.rglob("*")
        if p.is_file()
        and not p.is_symlink()
        and p.suffix in (".html", ".en", ".py", ".dz", ".pod", ".go", ".txt")
        and re.search(source.pattern, str(p))
        and not _UNWANTED.search(str(p))
    )
    random.Random(1).shuffle(files)
    for path in files:
        if path.suffix == ".dz":
            yield path, gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
        elif path.stat().st_size <= _LARGEST:
            yield path, path.read_text("utf-8", "ignore")
