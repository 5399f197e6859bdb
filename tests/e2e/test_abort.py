"""A request that is aborted is over, also when no step follows."""

from __future__ import annotations

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.engine.request import RequestOutput


@pytest.mark.parametrize("overlap", [False, True])
def test_the_last_request_needs_no_further_step_to_end(overlap: bool) -> None:
    """Else it is kept until another request comes, and a server that drains waits for it for ever."""
    llm = LLM(num_pages=16, max_num_seqs=2, async_scheduling=overlap)
    outputs: list[RequestOutput] = []
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    key = llm.submit([0, 3, 500, 600], params, outputs.append)
    llm.step()
    llm.abort(key)
    assert not llm._loop.requests and outputs[-1].finish_reason == "abort"
    while llm.has_work():
        llm.step()
    llm.core.check()
    assert sum(o.finished for o in outputs) == 1
    assert llm.generate([[0, 3, 500]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
