"""What the subcommands share: model and settings flags, and progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from dsv4.cli.words import reader
from dsv4.config import EngineConfig, load, sources
from dsv4.errors import ConfigError
from dsv4.settings import add_flags, base_type, help_of

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH = 140
"""Of lines that are wrapped."""
LINE_EVERY = 5.0
"""Seconds between lines of progress where there is no terminal."""


def add_settings(parser: argparse.ArgumentParser, *classes: type, model: bool = True) -> None:
    """MODEL, --config and one flag per setting of the given config classes."""
    if model:
        parser.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="directory with config.json and safetensors, or org/name in the local hub cache (default: the small model)",
        )
        parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="MODEL as a flag")
    parser.add_argument(
        "--config",
        dest="yaml",
        metavar="FILE",
        help="YAML file with the settings below; a flag comes first, then the environment (DSV4_PORT=9000), then the file, then --profile",
    )
    add_flags(parser, *classes)


def add_profile(parser: Any) -> None:
    """`--profile` of a command whose flags are not all settings."""
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help="settings of a profile (dsv4 profiles), for all flags that are not given",
    )


def read_settings(arguments: argparse.Namespace, *classes: type) -> list[Any]:
    """One config object per class from flags, environment and YAML. Raises ConfigError."""
    return load(classes, {**vars(arguments), "model": model_of(arguments)}, yaml_path=arguments.yaml)


def note_sources(arguments: argparse.Namespace, *classes: type) -> None:
    """Where the value of every setting comes from, a line for each place, on standard error."""
    flags = {**vars(arguments), "model": model_of(arguments)}
    for place, told in sources(classes, flags, yaml_path=arguments.yaml):
        text = f"settings   {f'from {place}' if place != 'default' else 'by default'}: {', '.join(told)}"
        if told:
            note(textwrap.fill(text, WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False))


def model_of(arguments: argparse.Namespace) -> str | None:
    """MODEL, which may be given by its place or as --model. Raises ConfigError when it is given twice."""
    flag: str | None = getattr(arguments, "model_flag", None)
    if flag is None:
        return arguments.model  # type: ignore[no-any-return]
    if arguments.model not in (None, flag):
        raise ConfigError(
            f"model is given twice, as {arguments.model!r} and as --model {flag!r}; give it once"
        )
    return flag


def add_numbers(parser: argparse.ArgumentParser, names: Mapping[str, Sequence[str]]) -> None:
    """Settings of EngineConfig that are numbers, with its words, for commands that have no engine; None where they are not given
    (`config.settle`). `names`: of each setting, further names of its flag."""
    hints = get_type_hints(EngineConfig)
    for f in dataclasses.fields(EngineConfig):
        if f.name in names:
            flags = [f"--{n}" for n in (f.name.replace("_", "-"), *f.metadata["aliases"], *names[f.name])]
            shown = help_of(f)
            kind = reader(f.metadata["range"], base_type(hints[f.name]))
            parser.add_argument(*flags, dest=f.name, type=kind, default=None, metavar="N", help=shown)


class LoadProgress:
    """Shows how far a start is (`dsv4.engine.progress`): a bar on a terminal, else a line every few seconds. Standard error only."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage, self._begun = "", 0.0
        self._next = time.monotonic() + LINE_EVERY
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> LoadProgress:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("weights", total=None, shown="")
        return self

    def __call__(self, done: int, total: int, name: str, stage: str = "weights") -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun = stage, now
        if self._bar is not None:
            text = _shown(done, total, stage, now - self._begun)
            self._bar.update(self._task, description=stage, completed=done, total=total, shown=text)
        elif now >= self._next:
            self._next = now + LINE_EVERY
            note(
                f"{stage} {100 * done / max(total, 1):.0f}% ({_shown(done, total, stage, now - self._begun)})"
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _shown(done: int, total: int, stage: str, seconds: float) -> str:
    """`1.0 of 4.0 GiB, 2.0 GiB/s` of weights, `3 of 80` of others."""
    if stage != "weights":
        return f"{done:,} of {total:,}"
    unit, name = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    rate = f", {done / unit / seconds:.1f} {name}/s" if seconds > 1 else ""
    return f"{done / unit:.1f} of {total / unit:.1f} {name}{rate}"


class PrefillProgress:
    """Shows how far a long prompt is read: one line rewritten on a terminal, else a line every few
    seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._began = total, time.monotonic()
        self._next = self._began + (0.5 if sys.stderr.isatty() else LINE_EVERY)
        self._shown = False

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        text = f"prefill {done:,}/{self._total:,} tokens, {done / (now - self._began):,.0f} tokens/s"
        if sys.stderr.isatty():
            self._next, self._shown = now + 0.1, True
            sys.stderr.write(f"\r\x1b[K{dim(text)}")
            sys.stderr.flush()
        else:
            self._next = now + LINE_EVERY
            note(text)

    def clear(self) -> None:
        """Removes the line before the answer begins."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def note(text: str) -> None:
    """A line on standard error; lost where that takes none (a full disk), as no work depends on it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def dim(text: str) -> str:
    """Grey on a terminal, plain elsewhere."""
    return f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text
