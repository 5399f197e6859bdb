"""Collections of garbage while a long request is read. Counted in a process of its own, as settings of the collector are the
process's."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.engine import group

from tests.support.checkpoints import write_random
from tests.support.scripted import python_path

SCRIPT = """
import gc, json, sys
from dsv4 import garbage
from dsv4.api.conversation import read_conversation
from dsv4.api.fields import Fields
from dsv4.api.http import parse_object
from dsv4.text.chat import encode_chat

messages = [{"role": "assistant" if i % 2 else "user", "content": f"word {i}"} for i in range(62_500)]
body = json.dumps({"messages": messages}).encode()
del messages
if sys.argv[1:] == ["settled"]:
    garbage.settle()
found = []
gc.callbacks.append(lambda phase, info: found.append(info["generation"]) if phase == "stop" else None)
segments = encode_chat(read_conversation(Fields(parse_object(body))).messages)
assert len(segments) > 187_500
gc.callbacks.clear()
print(sum(g == 2 for g in found))
"""


def full_collections(*arguments: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_no_full_collection_while_a_long_request_is_read() -> None:
    assert full_collections("settled") == 0


def test_memory_of_cycles_is_given_back() -> None:
    script = """
import gc, weakref
from dsv4 import garbage
class Node: pass
garbage.settle()
made = []
for i in range(100_000):
    a = Node(); a.itself = a
    if i < 100: made.append(weakref.ref(a))
assert not any(ref() for ref in made)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_rank_looks_at_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks would wait for it."""
    monkeypatch.setattr(group, "PROCESS", "tests.support.settled_rank")
    monkeypatch.setenv("PYTHONPATH", python_path())
    model = str(write_random(tmp_path / "tiny", compress_ratios=[0, 4, 128]))
    settings = dict(device="cpu", tensor_parallel_size=2, max_model_len=512, num_pages=8, max_num_seqs=2)
    with closing(LLM(model, **settings)) as llm:
        (done,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(done.token_ids) == 2


def test_no_collection_looks_at_everything_that_is_new() -> None:
    """A server of thousands of streams makes objects that stay, and each pause is one of all streams."""
    script = """
import gc
from dsv4 import garbage
garbage.settle()
looked = []
def note(phase, about):
    if phase == "start":
        looked.append(sum(len(gc.get_objects(g)) for g in range(about["generation"] + 1)))
gc.callbacks.append(note)
kept = [[i] for i in range(600_000)]
gc.callbacks.clear()
assert len(looked) > 50 and max(looked) <= 50_000, max(looked)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
