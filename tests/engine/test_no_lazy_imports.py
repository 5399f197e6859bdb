"""A step imports nothing: when files or memory have run out, an import is what fails. In a process of its own, as
other tests import everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.engines import write_tiny

SCRIPT = """
import dataclasses, sys
from importlib import resources
from dsv4 import LLM, SamplingParams
from dsv4.engine.routing import Routing
from dsv4.text.tokenizer import Tokenizer

model, record = sys.argv[1:]
llm = LLM(model, num_pages=64, max_num_seqs=2, block_size=128, max_num_batched_tokens=64, device="cpu", record_steps=record)
long = list(range(3, 203))
llm._front = dataclasses.replace(llm._front, tokenizer=Tokenizer.from_dir(str(resources.files("dsv4") / "data" / "nano"), vocab_size=8192))
known = set(sys.modules)
cases = [
    dict(),
    dict(temperature=1.0, seed=7, top_p=0.5, top_k=5, min_p=0.1),
    dict(temperature=1.0, logprobs=5, prompt_logprobs=3),
    dict(logit_bias={5: 1.0}, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=3),
    dict(stop=("e",), stop_token_ids=(7,)),
]
for case in cases:
    params = SamplingParams(**{"max_tokens": 6, "temperature": 0, **case})
    llm.generate([long[:9], long], params)           # cold, then resumed
list(llm.stream(long, SamplingParams(max_tokens=3)))
llm.core.evict_snapshots(100)                        # resumed by replay
llm.generate([long], SamplingParams(max_tokens=3))
done = []
params = SamplingParams(max_tokens=40, ignore_eos=True)
parent = llm.submit(long, params, done.append)
llm.step()
llm.submit(long, params, done.append, parent=parent)
for k in range(8):
    llm.step()
llm.submit(long[:50], params, done.append, routing=Routing(priority=1))
llm.abort(llm.submit(long, params, done.append))
while llm.has_work():
    llm.step()
broken = lambda *_, **__: 1 / 0
llm._loop.device.launch = broken
llm.submit(long, params, done.append)
llm.step()
stats = llm.core.stats()
assert stats["forks"] and stats["preemptions"] + stats["unparked"] and stats["replayed_tokens"], stats
print(*sorted(set(sys.modules) - known))
"""


def test_a_step_imports_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(write_tiny(tmp_path / "tiny")), str(tmp_path / "steps")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
