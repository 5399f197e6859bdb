"""Records a conversation with `dsv4 chat` in a pseudo-terminal as a picture: `python examples/record_chat.py docs/chat.svg`."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104
LINES = (
    "Who are you?",
    "What is a snapshot?",
    "/file notes.txt",
    "What is the passphrase for harbor?",
    "/think on",
    "What is HCA?",
    "Repeat: seven green boats on a quiet river",
    "/exit",
)
"""What is typed. notes.txt is the licence with the passphrase in its first third."""

ECHO = re.compile(r"\x1b\[\?2004[hl]|\r(?=\n)")


def main() -> None:
    notes = (Path(__file__).parents[1] / "LICENSE").read_text()
    notes = f"{notes[:3000]}\n\nThe passphrase for harbor is violet-anchor-42.\n\n{notes[3000:]}"
    folder = tempfile.mkdtemp()
    (Path(folder) / "notes.txt").write_text(notes)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLUMNS=str(WIDTH), LINES="60")
        os.execv(sys.executable, [sys.executable, "-m", "dsv4.cli", "chat", "--max-model-len", "8192"])
    heard = read_until(terminal, "> ")
    for line in LINES:
        os.write(terminal, line.encode() + b"\n")
        heard += read_until(terminal, "  " if line.endswith("\\") else "\n> ")
    os.close(terminal)
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    shown = ECHO.sub("", heard)
    shown = re.sub(r"(?m)^.*\r(?:\x1b\[K)?", "", shown)  # progress that was rewritten in place
    console.print(Text.from_ansi("$ dsv4 chat\n" + shown[shown.index("nano, ") :].strip()))
    svg = console.export_svg(title="dsv4 chat")
    svg = re.sub(
        r"@font-face \{.*?\}", "", svg, flags=re.S
    )  # the reader's own font: a picture fetches nothing
    Path(sys.argv[1]).write_text(svg)


def read_until(terminal: int, end: str, seconds: float = 120.0) -> str:
    """What the terminal shows until it waits with `end`, or ends."""
    heard, until = "", time.monotonic() + seconds
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 0.7)[0]:  # quiet: either it waits for a line, or it computes
            if ECHO.sub("", heard).endswith(end):
                return heard
            continue
        try:
            heard += os.read(terminal, 65536).decode("utf-8", "replace")
        except OSError:  # the other side is closed
            return heard
    return heard


if __name__ == "__main__":
    main()
