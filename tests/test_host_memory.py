"""Container limits on made-up /proc and /sys trees, as Docker, Kubernetes and systemd lay them out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dsv4 import doctor
from dsv4.host_memory import MACHINE, Bound, host_memory

GIB = 2**30
PATH = "/kubepods.slice/kubepods-pod1.slice/cri-1.scope"


def tree(root: Path, files: dict[str, str], available: int = 200 * GIB) -> Path:
    meminfo = f"MemTotal: {256 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
    for name, text in ({"proc/meminfo": meminfo} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(
    at: str, limit: int | str, used: int = 0, reclaimable: int = 0, high: int | str = "max"
) -> dict[str, str]:
    place = f"sys/fs/cgroup{at}/".replace("//", "/")
    return {
        place + "memory.max": f"{limit}\n",
        place + "memory.high": f"{high}\n",
        place + "memory.current": f"{used}\n",
        place + "memory.stat": f"anon 7\nactive_file 1\ninactive_file {reclaimable}\n",
    }


def v1(at: str, limit: int, used: int = 0, reclaimable: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory{at}/".replace("//", "/")
    return {
        place + "memory.limit_in_bytes": f"{limit}\n",
        place + "memory.usage_in_bytes": f"{used}\n",
        place + "memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {reclaimable}\n",
    }


def mounted_v2(top: str = "/") -> dict[str, str]:
    return {
        "proc/self/mountinfo": f"30 23 0:26 {top} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"
    }


def mounted_v1(top: str = "/") -> dict[str, str]:
    return {
        "proc/self/mountinfo": "33 31 0:29 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n"
        f"35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:11 master:4 - cgroup cgroup rw,memory\n"
        "40 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    }


def least(root: Path) -> Bound:
    return host_memory(root)[0]


def test_a_machine_without_limits_gives_what_is_available(tmp_path: Path) -> None:
    bounds = host_memory(tree(tmp_path, {}))
    assert bounds == [Bound(200 * GIB, 256 * GIB, "the machine's memory")]


def test_a_container_of_version_2_with_a_name_space(tmp_path: Path) -> None:
    files = (
        {"proc/self/cgroup": "0::/\n"} | mounted_v2() | v2("/", 8 * GIB, used=3 * GIB, reclaimable=1 * GIB)
    )
    found = least(tree(tmp_path, files))
    assert (found.free, found.limit) == (6 * GIB, 8 * GIB) and found.rule.endswith(
        "/sys/fs/cgroup/memory.max"
    )


def test_no_limit_is_no_bound(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n"} | mounted_v2() | v2("/a", "max", 1)
    assert least(tree(tmp_path, files)).free == 200 * GIB
    files = {"proc/self/cgroup": "4:memory:/a\n"} | mounted_v1() | v1("/a", 9223372036854771712, 1)
    assert least(tree(tmp_path / "v1", files)).free == 200 * GIB


def test_the_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    parent = PATH.rpartition("/")[0]
    files = {"proc/self/cgroup": f"0::{PATH}\n"} | mounted_v2()
    files |= v2(PATH, "max") | v2(parent, 16 * GIB, used=10 * GIB) | v2("/kubepods.slice", 100 * GIB)
    found = least(tree(tmp_path, files))
    assert found.free == 6 * GIB and parent in found.rule


def test_the_limit_at_which_the_kernel_slows_a_group_down_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n"} | mounted_v2() | v2("/a", 8 * GIB, used=GIB, high=4 * GIB)
    assert least(tree(tmp_path, files)).free == 3 * GIB


def test_a_container_of_version_1_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    """Docker without name spaces: the path is that of the host, the mount is the container's group."""
    files = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n"}
    files |= mounted_v1("/docker/1") | v1("/", 2 * GIB, used=GIB, reclaimable=GIB // 2)
    found = least(tree(tmp_path, files))
    assert found.free == 3 * GIB // 2 and "limit_in_bytes" in found.rule


def test_version_1_walks_up_and_a_combined_controller_is_found(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:hugetlb,memory:/user/app\n"} | mounted_v1()
    files |= v1("/user/app", 50 * GIB) | v1("/user", 4 * GIB, used=5 * GIB) | v1("/", 2**63 - 4096)
    assert least(tree(tmp_path, files)).free == 0, "over its limit: nothing, and not less"


@pytest.mark.parametrize("path", ["/../other", "/elsewhere/b", "", "/docker/12"])
def test_a_path_outside_the_mount_reads_the_mounts_own_group(tmp_path: Path, path: str) -> None:
    files = (
        {"proc/self/cgroup": f"0::{path}\n"} | mounted_v2("/docker/1") | v2("/", 5 * GIB) | v2("/other", GIB)
    )
    assert least(tree(tmp_path, files)).free == 5 * GIB


def test_a_group_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "garbage\n0::/a\n\n"} | mounted_v2() | v2("/", 9 * GIB)
    files["sys/fs/cgroup/a/memory.max"] = "what\n"
    files["proc/self/mountinfo"] += "short - cgroup2\n\n"
    assert least(tree(tmp_path, files)).free == 9 * GIB
    assert least(tmp_path / "nothing").rule == "the machine's memory"


def test_ulimit_v_counts() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from dsv4.host_memory import host_memory; b = host_memory()[0]; print(b.rule, 0 < b.free < 2**30, b.limit)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == f"ulimit -v True {2**30}", ran.stderr


def test_doctor_shows_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [Bound(GIB, 8 * GIB, "/sys/fs/cgroup/memory.max"), Bound(200 * GIB, 256 * GIB, MACHINE)]
    monkeypatch.setattr(doctor, "host_memory", lambda: bounds)
    [found] = doctor._memory()
    said = "200.0 of 256.0 GiB available; of a limit of 8.0 GiB 1.0 are left (/sys/fs/cgroup/memory.max)"
    assert (found.level, found.text) == ("note", said)
    monkeypatch.setattr(doctor, "host_memory", lambda: bounds[1:])
    assert [f.text for f in doctor._memory()] == ["200.0 of 256.0 GiB available"]
