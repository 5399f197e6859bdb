"""What is fetched of each Python peer."""

from __future__ import annotations

from pathlib import Path

from benches.wheels import FOLDER, fetch

PEERS = {
    "sglang": ("0.5.23", r"^sglang/srt/mem_cache/.*(\.py|mem_cache\.cpython-[^/]*\.so)$"),
    "vllm": ("0.33.0", r"^vllm/(v1/(core|metrics)/|v1/(request|kv_cache_\w+)\.py|utils/\w+\.py)"),
}
"""Version, and the members of the wheel that the benches load."""


def place(package: str) -> Path:
    """Where a peer's files lie; fetched when they do not. Raises OSError when they cannot be had."""
    version, members = PEERS[package]
    folder = FOLDER / f"{package}-{version}"
    if not folder.exists():
        print(fetch(package, version, members, folder), flush=True)
    return folder
