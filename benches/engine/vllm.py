"""vLLM as an engine that the same jobs run on, with random weights of the same shapes. Its V4 has to run on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np

from benches.engine.driver import Job


def installed() -> bool:
    """Whether it can be imported."""
    return find_spec("vllm") is not None


class Vllm:
    """Its engine core in this process, stepped by hand."""

    name = "vllm"
    on_gpu = True
    launching = 0.0

    def __init__(self, model: str, *, running: int, max_len: int, step_tokens: int | None, pool: int) -> None:
        """`model`: a directory with config.json. `pool`: bytes."""
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        more: dict[str, Any] = {} if step_tokens is None else {"max_num_batched_tokens": step_tokens}
        llm = vllm.LLM(
            model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=max_len, max_num_seqs=running,
            kv_cache_dtype="fp8", block_size=256, kv_cache_memory_bytes=pool, enable_prefix_caching=True, **more,
        )  # fmt: skip
        self.version, self._engine = vllm.__version__, llm.llm_engine
        self.vocab: int = self._engine.model_config.get_vocab_size()
        self._jobs: dict[str, tuple[Job, int]] = {}
        self._count = 0

    def submit(self, ids: np.ndarray, tokens: int) -> Job:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        self._count += 1
        job = Job()
        self._jobs[str(self._count)] = job, 0
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids.tolist()}, params)
        return job

    def step(self) -> None:
        for output in self._engine.step():
            job, before = self._jobs[output.request_id]
            now = len(output.outputs[0].token_ids)
            job.took(output.outputs[0].token_ids[before:])
            job.cached = getattr(output, "num_cached_tokens", None)
            self._jobs[output.request_id] = job, now
            if output.finished:
                del self._jobs[output.request_id]

    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def abort_all(self) -> None:
        self._engine.abort_request(list(self._jobs))
        self._jobs.clear()
