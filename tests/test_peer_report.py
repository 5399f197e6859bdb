"""The table of the peer benches judges right, from rows as the benches print them."""

from __future__ import annotations

from benches.peers import report


def row(process: str, bench: str, case: str, system: str, **numbers: float) -> report.Row:
    return {"process": process, "bench": bench, "case": case, "system": system, **numbers}


ROWS = [
    row("rust", "radix_match_1m", "floor", "memcmp", us=100.0),
    row("rust", "radix_match_1m", "full hit", "dsv4", us=150.0),
    row("sglang", "radix_match_1m", "full hit", "dsv4", us=300.0),
    row("sglang", "radix_match_1m", "full hit", "sglang 9.9 TreeCore (Rust)", us=1000.0),
    row("rust", "cache_bytes", "262,144 blocks", "dsv4", bytes=129.0),
    row("rust", "trace", "4096 blocks", "dsv4", hit=0.2, us=10.0),
    row("rust", "trace", "4096 blocks", "dsv4 value", hit=0.204, us=10.0),
    row("rust", "trace", "4096 blocks", "floor", hit=0.2, us=4.0),
    {"process": "vllm", "bench": "skipped", "case": "", "system": "vllm", "reason": "no wheel"},
]


def judged() -> dict[tuple[str, str, str], list[str]]:
    """(bench, measure and system, against): verdict of each line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for line in report.table(ROWS)[2:]:
        bench, _, measure, mine, against, _, _, _, verdict = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        name = "value" if "(value)" in mine else "lru"
        found.setdefault((bench, f"{measure} {name}", against), []).append(verdict.strip("*"))
    return found


def test_ratios_are_of_one_process_and_on_the_right_side_of_the_aim() -> None:
    found = judged()
    assert found["radix_match_1m", "us lru", "memcmp"] == ["reached"]
    assert found["radix_match_1m", "us lru", "sglang 9.9 TreeCore (Rust)"] == ["missed"]  # 0.3, not 0.15
    assert found["cache_bytes", "bytes lru", "the number itself"] == ["missed"]
    assert found["trace", "us lru", "floor"] == ["missed"]
    assert found["trace", "hit lru", "floor"] == ["reached"]
    assert found["trace", "hit value", "floor"] == ["reached", "missed"]  # at least as good, but not by 3%


def test_what_did_not_run_is_named() -> None:
    assert report.skipped(ROWS) == ["- vllm: no wheel"]
