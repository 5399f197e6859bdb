"""How much of the host's memory this process may take: of the machine, of its container, of its own limits.

A container sees the machine's /proc/meminfo whatever it may use itself. Its limit is in the files of its control group
(version 1 or 2), or in those of a group above it, and the least of all counts.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MACHINE = "the machine's memory"
"""The rule that there always is."""
UNMAPPED = "failed to map segment"
"""What the loader of libraries says where there is no memory for one."""
_UNLIMITED = 2**60
"""Larger limits mean none: version 1 writes the largest multiple of a page below 2^63."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Memory that one rule leaves to this process, in bytes."""

    free: int
    limit: int
    """What the rule gives in all."""
    rule: str
    """Where it stands: a file, or `ulimit -v`."""


def host_memory(root: Path = Path("/")) -> list[Bound]:
    """Every rule, the tightest first; never empty. `root`: where /proc and the mounts are, for tests."""
    bounds = [_machine(root), *_groups(root), *_address_space(root)]
    return sorted(bounds, key=lambda b: b.free)


def no_room(error: BaseException) -> str | None:
    """The line for an error that says that a library found no memory, as torch's do under `ulimit -v`; None for others."""
    if not isinstance(error, ImportError) or UNMAPPED not in str(error):
        return None
    least = host_memory()[0]
    return f"{error}: {least.free / 2**30:.1f} GiB of memory are free ({least.rule})"


def _machine(root: Path) -> Bound:
    """All memory, and what can be had of it without swapping."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = dict.fromkeys(("MemTotal", "MemAvailable"), 0)
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name in sizes and value.split():
            sizes[name] = int(value.split()[0]) * 1024
    total = sizes["MemTotal"] or pages
    return Bound(sizes["MemAvailable"] or total // 2, total, MACHINE)


def _groups(root: Path) -> Iterator[Bound]:
    """Limits of this process's control group and those above it, as far as they are mounted here."""
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(path or "/"))
    for version, top, mount in _mounts(root):
        path = paths.get(version.controller)
        if path is None:
            continue
        # A container may see a part of the tree only, mounted at `top`; what is not below that is not ours to see.
        inside = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else "."
        group = mount / inside
        while group.is_relative_to(mount):
            yield from version.bounds(group)
            group = group.parent


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of the files of a version of control groups."""

    controller: str
    """Which line of /proc/self/cgroup is meant."""
    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    """In memory.stat: what the kernel gives back before anything fails, as read files are."""

    def bounds(self, group: Path) -> Iterator[Bound]:
        """The limits of one group; none where a file is missing or says that there is none."""
        used = _number(group / self.usage)
        if used is None:
            return
        stat = dict((*line.split(), "", "")[:2] for line in _lines(group / "memory.stat"))
        kept = stat.get(self.reclaimable, "")
        used -= min(used, int(kept) if kept.isdigit() else 0)
        for name in self.limits:
            limit = _number(group / name)
            if limit is not None and limit < _UNLIMITED:
                yield Bound(max(limit - used, 0), limit, str(group / name))


_V1 = _Version("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("", ("memory.max", "memory.high"), "memory.current", "inactive_file")


def _mounts(root: Path) -> Iterator[tuple[_Version, str, Path]]:
    """(version, path of the mounted group, where it is mounted) of the mounts that hold the memory controller."""
    for line in _lines(root / "proc/self/mountinfo"):
        # number, parent, device, top, mount, options - type, source, options of the type
        left, _, right = line.partition(" - ")
        place, kind = left.split(), right.split()
        version = {"cgroup": _V1, "cgroup2": _V2}.get(kind[0]) if kind else None
        if version is None or len(place) < 5 or (version is _V1 and "memory" not in kind[-1].split(",")):
            continue
        top, mount = (p.replace("\\040", " ") for p in place[3:5])
        yield version, top, root / mount.lstrip("/")


def _address_space(root: Path) -> Iterator[Bound]:
    """`ulimit -v`."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    words = " ".join(_lines(root / "proc/self/statm")).split()
    if limit != resource.RLIM_INFINITY and limit < _UNLIMITED and words:
        used = int(words[0]) * os.sysconf("SC_PAGE_SIZE")
        yield Bound(max(limit - used, 0), limit, "ulimit -v")


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
