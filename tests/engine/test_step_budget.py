"""What a long prompt does to a running stream: by default a step with both takes four times as long as one of decodes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.config import EngineConfig, load
from dsv4.engine.build import build_engine
from dsv4.engine.loop import EngineLoop
from dsv4.errors import ConfigError

from tests.support.engines import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


class Clocked:
    """A core that is told that a step takes `base_ms` and `token_ms` for each token of a prompt, whatever it took."""

    def __init__(self, loop: EngineLoop, base_ms: float, token_ms: float) -> None:
        self._core, self._plan, self._base, self._token = loop.core, loop.plans[0], base_ms, token_ms
        self.steps: list[tuple[float, int]] = []
        """Milliseconds and prompt tokens of each."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def observe(self, step: int, us: float) -> None:
        prompt = self._plan.tokens - self._plan.decode_rows
        ms = self._base + self._token * prompt
        self.steps.append((ms, prompt))
        self._core.observe(step, 1000 * ms)


def read_beside_a_stream(model: Path, base_ms: float, token_ms: float, **settings: Any) -> Clocked:
    """Steps while a prompt of 4,000 tokens is read beside a running stream, those of the first 2,000 left out."""
    defaults: dict[str, Any] = dict(num_pages=100, max_num_seqs=2, max_num_batched_tokens=512, device="cpu")
    llm = LLM(str(model), enable_prefix_caching=False, **defaults | settings)
    loop = llm._loop
    clocked = loop.core = Clocked(loop, base_ms, token_ms)  # type: ignore[assignment]
    llm.submit([5, 6, 7], SamplingParams(max_tokens=5000, ignore_eos=True), lambda output: None)
    for _ in range(40):
        llm.step()
    ends: list[Any] = []
    prompt = [3 + i % 200 for i in range(4000)]
    llm.submit(prompt, SamplingParams(max_tokens=1), ends.append)
    while sum(tokens for _, tokens in clocked.steps) < 2003:
        llm.step()
    clocked.steps.clear()
    while not any(e.finished for e in ends):
        llm.step()
    return clocked


@pytest.mark.parametrize("token_ms", [0.1, 0.25])
def test_by_default_a_step_takes_four_times_what_the_decodes_take_alone(model: Path, token_ms: float) -> None:
    """10 ms alone: 40 ms with a prompt, whatever prompts cost here, which is learnt."""
    steps = read_beside_a_stream(model, 10, token_ms).steps
    times = [ms for ms, _ in steps[:-1]]
    assert max(times) <= 44 and statistics.median(times) >= 34, times
    # What of the device's speed for prompts alone is left: more than 40%.
    alone = 512 / (10 + 512 * token_ms)
    assert sum(n for _, n in steps) / sum(ms for ms, _ in steps) > 0.4 * alone


def test_where_prompts_are_dear_they_get_a_floor_of_tokens(model: Path) -> None:
    pieces = [n for _, n in read_beside_a_stream(model, 1, 10).steps]
    assert statistics.median(pieces) == 64 and max(pieces) <= 64


def test_none_turns_it_off_and_a_number_is_taken_as_it_is(model: Path) -> None:
    assert statistics.median([n for _, n in read_beside_a_stream(model, 10, 0.1, step_ms=None).steps]) == 511
    times = [ms for ms, _ in read_beside_a_stream(model, 10, 0.1, step_ms=25.0).steps]
    assert statistics.median(times) >= 20 and max(times) <= 27.5


def test_a_prompt_alone_has_whole_steps(model: Path) -> None:
    llm = LLM(str(model), num_pages=100, max_num_seqs=2, max_num_batched_tokens=512, device="cpu")
    clocked = llm._loop.core = Clocked(llm._loop, 10, 1)  # type: ignore[assignment]
    llm.generate([[3 + i % 200 for i in range(2049)]], SamplingParams(max_tokens=1))
    assert {n for _, n in clocked.steps[:4]} == {512}


@pytest.mark.parametrize(
    ("step_ms", "said"),
    [
        ("auto", "step time auto: 4 times that of the decodes alone, or of 64 prompt tokens if longer"),
        (None, "step time open"),
        (30.0, "step time 30 ms while requests decode"),
    ],
)
def test_the_start_says_what_was_chosen(model: Path, step_ms: Any, said: str) -> None:
    config = EngineConfig(str(model), num_pages=20, max_num_seqs=2, device="cpu", step_ms=step_ms)
    assert said in "\n".join(build_engine(config).describe())


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("AUTO", "auto"), ("none", None), ("12.5", 12.5)]
)
def test_the_setting_takes_a_number_auto_or_none(text: str, value: object) -> None:
    assert load([EngineConfig], {}, {"DSV4_STEP_MS": text})[0].step_ms == value


@pytest.mark.parametrize("bad", ["0", "-3", "inf", "nan", "fast", ""])
def test_other_values_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"step_ms is .*auto.* none"):
        load([EngineConfig], {}, {"DSV4_STEP_MS": bad})
