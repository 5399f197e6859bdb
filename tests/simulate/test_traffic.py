"""Generated conversations, rollouts and documents: the same from the same seed, and exact in what they share."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from dsv4._core import Trace
from dsv4.cli import main
from dsv4.simulate.agents import Agents
from dsv4.simulate.records import BLOCK, LogNormal
from dsv4.simulate.traffic import Chat, Documents, Mixed, Rollouts, Spec, generate, mixed

SMALL: dict[str, Spec] = {
    "chat": Chat(sessions=80),
    "rollouts": Rollouts(sessions=6, batch=2, answers=5, every_s=10),
    "documents": Documents(sessions=20, document=LogNormal(5_000, 8_000, 50_000)),
    "mixed": Mixed(
        Agents(sessions=2, calls=LogNormal(4, 6, 12)),
        Chat(sessions=9),
        Rollouts(sessions=2),
        Documents(sessions=2),
    ),
}


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_a_seed_makes_one_trace_whose_later_prompts_go_on(spec: Spec) -> None:
    records = generate(spec, 3)
    assert records == generate(spec, 3) != generate(spec, 4)
    assert [r["timestamp"] for r in records] == sorted(r["timestamp"] for r in records)
    before: dict[str, dict] = {}
    grown = 0
    for r in records:
        assert len(r["hash_ids"]) == -(-r["input_length"] // BLOCK)
        last = before.get(r["session"])
        before[r["session"]] = r
        if last is None or "output_hash_ids" not in last:
            continue
        said = last["hash_ids"][: last["input_length"] // BLOCK] + last["output_hash_ids"]
        grown += r["hash_ids"][: len(said)] == said and "delay" in r
    assert grown > 0 or isinstance(spec, Rollouts)


def test_answers_of_a_rollout_have_one_prompt_and_come_together() -> None:
    records = generate(SMALL["rollouts"], 1)
    prompts = {}
    for r in records:
        prompts.setdefault(tuple(r["hash_ids"]), []).append(r)
    assert [len(same) for same in prompts.values()] == [5] * 6
    assert all(len({r["timestamp"] for r in same}) == 1 for same in prompts.values())
    assert {r["timestamp"] for r in records} == {0, 10_000, 20_000}


def test_some_documents_are_read_by_many() -> None:
    records = [r for r in generate(Documents(sessions=60), 2) if "delay" not in r]
    firsts = [r["hash_ids"][0] for r in records]
    assert 20 < len(set(firsts)) < len(firsts) == 60
    assert 80_000 < median(r["input_length"] for r in records) < 130_000


def test_parts_of_a_mixed_trace_share_no_ids() -> None:
    records = generate(SMALL["mixed"], 5)
    kinds: dict[str, set[int]] = {}
    for r in records:
        kinds.setdefault(r["session"][0], set()).update(r["hash_ids"])
    assert set(kinds) == {"s", "c", "r", "d"}
    assert sum(map(len, kinds.values())) == len(set.union(*kinds.values()))
    assert mixed(1, 0.1, 0.0).chat.sessions == 1


@pytest.mark.parametrize("kind", ["chat", "rollouts", "documents", "mixed"])
def test_the_core_reads_what_the_command_writes(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    assert main(["trace", kind, "-o", path, "--sessions", "4", "--seed", "2"]) == 0
    trace = Trace.read([path])
    assert len(trace) >= 4 and trace.skipped == []
