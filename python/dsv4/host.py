"""What the GPUs of this host have between them: links, peer access, NUMA nodes, and the shared memory of processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("dsv4.engine")

LINKS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the CPU's PCIe bridge",
    "NODE": "PCIe within a NUMA node",
    "SYS": "PCIe and the link between CPUs",
}
"""What `nvidia-smi topo -m` calls a link, by the start of its name, from the fastest on."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that this process sees. `numa`: its NUMA node; -1 if the host does not say."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    numa: int = -1


@dataclass(frozen=True, slots=True)
class Host:
    """`links` and `peers` are by pairs of cards (a < b): the link's name ("" if unknown), and whether each reaches the other's
    memory. `shared`: (free, all) bytes of /dev/shm; None without one. `visible`: CUDA_VISIBLE_DEVICES."""

    cards: tuple[Card, ...] = ()
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    peers: Mapping[tuple[int, int], bool] = field(default_factory=dict)
    shared: tuple[int, int] | None = None
    visible: str | None = None

    @classmethod
    def here(cls) -> Host:
        """Of this machine. What a tool or a file does not say is left out."""
        import torch

        shared, visible = shared_memory(), os.environ.get("CUDA_VISIBLE_DEVICES")
        if not torch.cuda.is_available():
            return cls(shared=shared, visible=visible)
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        buses = bus_ids(_smi("--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"))
        matrix = link_matrix(_smi("topo", "-m"))
        at = [buses.get(str(getattr(p, "uuid", "")), (None, "")) for p in found]
        pairs = [(a, b) for a in range(len(found)) for b in range(a + 1, len(found))]

        def reach(a: int, b: int) -> bool:
            return torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)

        return cls(
            tuple(
                Card(p.name, p.total_memory, (p.major, p.minor), numa_node(bus))
                for p, (_, bus) in zip(found, at, strict=True)
            ),
            {(a, b): matrix.get((at[a][0], at[b][0]), "") for a, b in pairs},
            {(a, b): reach(a, b) for a, b in pairs},
            shared,
            visible,
        )

    def groups(self) -> list[tuple[str, bool, list[tuple[int, int]]]]:
        """(link, whether it carries peer access, pairs) of pairs that are alike, the fastest links first."""
        alike: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for pair, link in self.links.items():
            alike.setdefault((link, self.peers.get(pair, False)), []).append(pair)
        order = list(LINKS)

        def rank(link: str) -> tuple[int, int]:
            kind = _kind(link)
            lanes = int(link[2:]) if kind == "NV" and link[2:].isdecimal() else 0
            return (order.index(kind) if kind else len(order), -lanes)

        return [(*k, pairs) for k, pairs in sorted(alike.items(), key=lambda x: (rank(x[0][0]), not x[0][1]))]


def words_of(link: str) -> str:
    """`NV18` -> `NV18 (NVLink)`."""
    kind = _kind(link)
    return f"{link} ({LINKS[kind]})" if kind else "a link that nvidia-smi does not name"


def _kind(link: str) -> str:
    """The key of LINKS that a link is of, or nothing."""
    return next((k for k in LINKS if link == k or (k == "NV" and link.startswith(k))), "")


def link_matrix(text: str) -> dict[tuple[int | None, int | None], str]:
    """The links between GPUs of what `nvidia-smi topo -m` prints, by their numbers there, both ways."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    head = next((line for line in lines if "CPU Affinity" in line), "")
    columns = [int(n) for n in re.findall(r"\bGPU(\d+)\b", head)]
    found: dict[tuple[int | None, int | None], str] = {}
    for line in lines:
        row = re.match(r"\s*GPU(\d+)\s+(.*)", line)
        if row is not None and line != head:
            for column, link in zip(columns, row[2].split(), strict=False):
                if link != "X":
                    found[int(row[1]), column] = link
    return found


def bus_ids(text: str) -> dict[str, tuple[int | None, str]]:
    """UUID without `GPU-` -> (number, PCI address) of each line `0, GPU-…, 00000000:19:00.0`."""
    found: dict[str, tuple[int | None, str]] = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(",")]
        if len(cells) == 3 and cells[0].isdecimal():
            found[cells[1].removeprefix("GPU-")] = int(cells[0]), cells[2].lower()
    return found


def numa_node(bus: str, root: Path = Path("/sys/bus/pci/devices")) -> int:
    """The node of a PCI address as nvidia-smi writes it; -1 where the system does not say."""
    if not bus:
        return -1
    domain, _, rest = bus.partition(":")
    try:
        return int((root / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def cpus_of(node: int, root: Path = Path("/sys/devices/system/node")) -> set[int]:
    """The CPUs of a NUMA node; none where the system does not say."""
    try:
        runs = (root / f"node{node}" / "cpulist").read_text().strip().split(",")
        ends = [(int(run.partition("-")[0]), int(run.rpartition("-")[2])) for run in runs if run]
    except (OSError, ValueError):
        return set()
    return {cpu for first, last in ends for cpu in range(first, last + 1)}


def stay_near(device: int) -> None:
    """Keeps the threads of this process on the CPUs of a CUDA device's NUMA node, as far as it may use any of them, and logs it. Where
    the system does not say which these are, nothing changes."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    _, bus = bus_ids(_smi("--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader")).get(uuid, (None, ""))
    node = numa_node(bus)
    if bind(cpus_of(node)):
        log.info("GPU %d is on NUMA node %d, and so is its process", device, node)


def bind(cpus: set[int]) -> bool:
    """Keeps all threads of this process, and those that they start, on these CPUs. False, and nothing is done, where it may use
    none of them."""
    allowed = cpus & os.sched_getaffinity(0)
    if not allowed:
        return False
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has just ended
            os.sched_setaffinity(int(thread), allowed)
    return True


def shared_memory(path: str = "/dev/shm") -> tuple[int, int] | None:
    """(free, all) bytes of a mounted /dev/shm."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free, usage.total


def _smi(*arguments: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> str:
    """What nvidia-smi prints; nothing where there is none or it hangs."""
    try:
        return run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
