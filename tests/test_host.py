"""What doctor says of several GPUs, their links and shared memory, from facts that are put in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import doctor
from dsv4.doctor import Finding
from dsv4.host import Card, Host, _smi, bind, bus_ids, cpus_of, link_matrix, numa_node, shared_memory
from dsv4.host_memory import MACHINE, Bound

from tests.support.scripted import ROOT

GIB = 2**30
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tNODE\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tSYS\tSYS\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNV4\tSYS\t48-95\t1\t\tN/A
GPU3\tNODE\tSYS\tNV4\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def _h200(count: int, link: str = "NV18", **changes: Any) -> Host:
    cards = tuple(Card("NVIDIA H200", 150_754_820_096, (9, 0), numa=i // 4) for i in range(count))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    known: dict[str, Any] = dict(
        cards=cards, links=dict.fromkeys(pairs, link), peers=dict.fromkeys(pairs, True), shared=(GIB, GIB)
    )
    return Host(**(known | changes))


def _said(host: Host, model: str | None = None) -> list[Finding]:
    return list(doctor._machine(host, model))


def _line(findings: list[Finding], name: str) -> Finding:
    [found] = [f for f in findings if f.name == name]
    return found


def test_links_are_read_from_what_nvidia_smi_prints() -> None:
    found = link_matrix(TOPOLOGY)
    assert (found[0, 1], found[1, 0], found[2, 3], found[0, 3]) == ("NV18", "NV18", "NV4", "NODE")
    assert len(found) == 12 and (0, 0) not in found
    one = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-47\t0\n"
    assert link_matrix(one) == link_matrix("") == {}
    cards = bus_ids("0, GPU-ab-1, 00000000:19:00.0\n1, GPU-ab-2, 00000000:3B:00.0\nNo devices were found\n")
    assert cards == {"ab-1": (0, "00000000:19:00.0"), "ab-2": (1, "00000000:3b:00.0")}


def test_a_numa_node_is_that_of_the_pci_device(tmp_path: Path) -> None:
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0" / "numa_node").write_text("1\n")
    assert numa_node("00000000:3b:00.0", tmp_path) == 1
    assert numa_node("00000000:19:00.0", tmp_path) == numa_node("", tmp_path) == -1


def test_two_gpus_and_what_they_hold() -> None:
    findings = _said(_h200(2, visible="2,3"))
    assert _line(findings, "visible").text == "CUDA_VISIBLE_DEVICES=2,3: 2 GPUs of it here"
    assert [f.text for f in findings if f.name == "gpu"][1] == "1: NVIDIA H200, 140 GiB, sm_90, NUMA node 0"
    assert _line(findings, "links").text == "GPUs 0-1: NV18 (NVLink), peer access"
    assert _line(findings, "shared memory").text == "1,024 of 1,024 MiB free in /dev/shm"
    flash, pro = [f for f in findings if f.name == "ranks"]
    assert flash.level == "ok" and flash.text.startswith("v4-flash: 2 of 2 GPUs hold ")
    assert (pro.level, pro.text) == ("note", "v4-pro: 2 of 2 GPUs do not hold the weights")
    [asked] = [f for f in _said(_h200(8), "v4-pro") if f.name == "ranks"]
    assert asked.text.startswith("v4-pro: 8 of 8 GPUs hold ")


def test_links_that_differ_are_grouped_and_what_lacks_is_said() -> None:
    pairs = {(a, b): link_matrix(TOPOLOGY)[a, b] for a in range(4) for b in range(a + 1, 4)}
    host = _h200(4, links=pairs, peers={(0, 1): True, (2, 3): True}, shared=(16 * 2**20, 32 * 2**20))
    said = [(f.level, f.text) for f in _said(host) if f.name == "links"]
    through = "no peer access: ranks exchange through the host's memory"
    assert said == [
        ("ok", "GPUs 0-1: NV18 (NVLink), peer access"),
        ("ok", "GPUs 2-3: NV4 (NVLink), peer access"),
        ("note", f"GPUs 0-3: NODE (PCIe within a NUMA node), {through}"),
        ("note", f"GPUs 0-2, 1-2, 1-3: SYS (PCIe and the link between CPUs), {through}"),
    ]
    small = _line(_said(host), "shared memory")
    assert (small.level, small.text) == (
        "note",
        "16 of 32 MiB free in /dev/shm",
    ) and "--shm-size" in small.fix
    eight = [f.text for f in _said(_h200(8)) if f.name == "links"]
    assert eight == ["all 28 pairs: NV18 (NVLink), peer access", "GPUs are on 2 NUMA nodes: 0, 1"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = _said(Host(shared=None, visible=""))
    assert (
        _line(findings, "ranks").text
        == "no GPU: one rank, on the CPU (--tensor-parallel-size R takes R processes)"
    )
    assert _line(findings, "gpu").text.startswith("none (torch ")
    memory = [Bound(60 * GIB, 64 * GIB, MACHINE)]
    monkeypatch.setattr(doctor, "host_memory", lambda: memory)
    _, flash = [f for f in _said(Host(shared=None, visible=""), "v4-flash") if f.name == "ranks"]
    assert flash.text.startswith("v4-flash: 155.42 GiB of weights, ") and "dsv4 plan v4-flash" in flash.fix
    assert flash.level == "note"
    assert _line(findings, "visible").text == "CUDA_VISIBLE_DEVICES=: 0 GPUs of it here"
    assert _line(findings, "shared memory").text == "no /dev/shm"
    assert all(f.level != "missing" for f in findings)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Host.here().visible == "5" and not Host.here().cards
    memory[0] = Bound(240 * GIB, 256 * GIB, MACHINE)
    _, flash = [f for f in _said(Host(shared=None), "v4-flash") if f.name == "ranks"]
    assert flash.level == "ok" and flash.text.endswith("240.0 GiB of memory")


def test_what_needs_a_gpu_is_in_make_test_gpu() -> None:
    makefile = (ROOT / "Makefile").read_text()
    taken, left = (
        re.search(rf"^{name} := (.*)$", makefile, re.M)[1].split() for name in ("ON_GPU", "NOT_ON_GPU")
    )  # type: ignore[index]
    assert all((ROOT / path).exists() for path in (*taken, *left))
    needs = re.compile(r"needs a CUDA device|@on_(gpu|hopper)|DEVICES = |import DEVICE")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        if needs.search(path.read_text()) and path != Path(__file__):
            assert name.startswith(tuple(taken)) and name not in left, name


def test_tools_that_fail_or_hang_say_nothing() -> None:
    def hangs(*_: object, **__: object) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    assert _smi("topo", "-m", run=hangs) == ""
    assert shared_memory("/no/such/place") is None


def test_a_process_stays_on_the_processors_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("0,2-3,8-9\n")
    assert cpus_of(1, tmp_path) == {0, 2, 3, 8, 9} and cpus_of(-1, tmp_path) == set()
    assert not bind(set()) and not bind({10**6})
    script = (
        "import os, threading; from dsv4.host import bind; first = min(os.sched_getaffinity(0)); go = threading.Event(); told = []\n"
        "t = threading.Thread(target=lambda: (go.wait(), told.append(os.sched_getaffinity(0)))); t.start()\n"
        "assert bind({first, 10**6}); go.set(); t.join(); assert told == [{first}], told"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=dict(os.environ))
