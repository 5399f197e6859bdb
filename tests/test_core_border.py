"""The border to the Rust core: numbers, arrays written in place, errors by class, loops with a fake model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from dsv4 import _core
from dsv4._core import RESET, Core, LayoutSpec, plan_schema
from dsv4.engine.buffers import StepPlan
from dsv4.model.layout import over_ranks

from tests.support.layouts import v4_layout

FLASH = [0, 0] + [4, 128] * 20 + [4]
PRO = [128, 128] + [4, 128] * 29 + [4]
SLABS, STEP_TOKENS, MAX_LEN = 4, 100, 1024


SMALL = v4_layout([0, 4, 128], block_tokens=128)


def make_core(**changes: Any) -> Core:
    options = dict(pages=64, slabs=SLABS, max_step_tokens=STEP_TOKENS, max_len=MAX_LEN)
    return Core(SMALL, options | changes)


def buffer(core: Core) -> StepPlan:
    return StepPlan(core.plan_schema())


def prompt(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_flash_and_pro_have_the_published_numbers() -> None:
    flash, pro = v4_layout(FLASH), v4_layout(PRO)
    assert flash.history_bytes_per_token == 3514.25
    assert pro.history_bytes_per_token == pytest.approx(5031.44, abs=0.005)
    assert (flash.replay_tokens, pro.replay_tokens) == (127 * 43, 127 * 61)
    for spec in (flash, pro):
        assert 1 <= spec.page_bytes / spec.block_tokens / spec.history_bytes_per_token < 1.01
        assert spec.snapshot_pages == -(-spec.snapshot_bytes // spec.page_bytes)
        assert spec.pages_for(10 * spec.page_bytes - 1) == 9


def test_components_say_where_everything_lies() -> None:
    spec = v4_layout(FLASH)
    names = ["csa", "csa_index", "hca", "window", "csa_pool", "csa_index_pool", "hca_pool"]
    assert [c.name for c in spec.components] == names
    ends = {"page": 0, "slab": 0, "snapshot": 0}
    for c in spec.components:
        home = "page" if c.kind == "stride" else "slab"
        assert (c.offset, c.snapshot_offset) == (ends[home], ends["snapshot"])
        assert c.layer_stride >= c.rows * c.row_bytes and c.layer_stride % 16 == 0
        ends[home] += c.layer_stride * len(c.layers)
        ends["snapshot"] += c.snapshot_layer_stride * len(c.layers)
    assert ends["page"] <= spec.page_bytes and ends["slab"] <= spec.slab_bytes
    assert ends["snapshot"] == spec.snapshot_bytes
    csa, window = spec.components[0], spec.components[3]
    assert (csa.kind, csa.ratio, csa.rows, csa.saved_rows, len(csa.layers)) == ("stride", 4, 64, 0, 21)
    assert (window.kind, window.tokens, window.slack, window.rows, window.saved_rows) == (
        "window",
        128,
        0,
        128,
        128,
    )


def test_a_layout_goes_through_data() -> None:
    spec = v4_layout(PRO)
    again = LayoutSpec(spec.data())
    assert again == spec and hash(again) == hash(spec) and again.fingerprint == spec.fingerprint
    assert v4_layout(FLASH) != spec
    one = {k: v for k, v in spec.data().items() if k != "ranks"}
    assert LayoutSpec(one) == spec and spec.ranks == 1


def test_a_rank_of_a_layout_has_its_rows_of_a_page_and_its_run_of_a_state() -> None:
    one, two = v4_layout(FLASH), v4_layout(FLASH, ranks=2)
    half = v4_layout(FLASH, block_tokens=128)
    assert (two.ranks, two.block_tokens, two.page_bytes) == (2, 256, half.page_bytes)
    assert two.history_bytes_per_token == one.history_bytes_per_token / 2
    for whole, part, same in zip(one.components, two.components, half.components, strict=True):
        where = [(c.offset, c.layer_stride, c.rows) for c in (part, same)]
        assert where[0] == where[1] and part.ratio == whole.ratio
    assert (two.slab_bytes, two.snapshot_bytes) == (one.slab_bytes, one.snapshot_bytes)
    assert two.snapshot_pages == -(-one.snapshot_bytes // 2 // two.page_bytes)
    assert two.fingerprint != one.fingerprint
    four = over_ranks(one, 4)
    assert (four.ranks, four.block_tokens, four.page_bytes) == (4, 512, half.page_bytes)
    with pytest.raises(_core.ConfigError, match="multiple of the ratio 128 of component hca times 4 ranks"):
        v4_layout(FLASH, ranks=4)


def test_errors_have_their_class_and_say_what_to_do() -> None:
    with pytest.raises(_core.ConfigError, match=r"block_tokens is 192; it must be a multiple of"):
        v4_layout(FLASH, block_tokens=192)
    with pytest.raises(
        ValueError, match='snapshots is "sometimes"; valid values are auto, forks, turns, every:N, none'
    ):
        make_core(snapshots="sometimes")
    with pytest.raises(_core.ConfigError, match="max_in_flight is 3; it must be 1 or 2"):
        make_core(max_in_flight=3)
    core = make_core(pages=2, max_waiting=1)
    with pytest.raises(_core.NeverFits, match=r"needs 3 pages of history and the pool has 2; at most 256"):
        core.submit(1, np.zeros(250, np.int32), max_new=20)
    with pytest.raises(_core.ConfigError, match="prompt and output have 1030 tokens and max_len is 1024"):
        core.submit(1, prompt(1), max_new=1029)
    with pytest.raises(_core.ConfigError, match="empty prompt"):
        core.submit(1, prompt(), max_new=1)
    with pytest.raises(_core.ConfigError, match="prompt is with token -3; token ids are at least 0"):
        core.submit(1, prompt(1, -3), max_new=1)
    with pytest.raises(
        _core.ConfigError,
        match=r"prompt is of dtype int64; it must be .* of dtype int32",
    ):
        core.submit(1, np.zeros(3, np.int64), max_new=1)
    core.submit(1, prompt(1), max_new=1)
    with pytest.raises(_core.Dsv4Error, match="request 1 is already known"):
        core.submit(1, prompt(1), max_new=1)
    with pytest.raises(_core.Overloaded, match="1 requests are waiting and max_waiting is 1"):
        core.submit(2, prompt(1), max_new=1)
    with pytest.raises(KeyError, match="request 9 is not known"):
        core.explain(9)
    with pytest.raises(_core.Dsv4Error, match=r"step 5 cannot be committed; in flight are \[\]"):
        core.commit(5, prompt(), prompt())
    assert issubclass(_core.CorruptState, _core.Dsv4Error) and not issubclass(_core.CorruptState, ValueError)


UNKNOWN = [
    (
        {"evicton": "lru"},
        'options is with the unknown key "evicton"; did you mean "eviction"\\? Keys are pages, slabs',
    ),
    ({"cost": {"tokens_us": 1}}, 'cost is with the unknown key "tokens_us"; did you mean "token_us"'),
    (
        {"tenants": [{"id": 1, "weight": 1.0, "quota": 3}]},
        r'tenants\[0\] is with the .* did you mean "quota_pages"',
    ),
    ({"step_budget": "opn"}, 'step_budget is "opn"; did you mean "open"'),
    (
        {"step_budget": {"decodes": {"times": 0.5, "floor": 1}}},
        "step_budget.decodes.times is 0.5; it must be",
    ),
    ({"eviction": "mru"}, f'eviction is "mru"; valid values are {", ".join(_core.EVICTIONS)}$'),
    ({"snapshots": "every:0"}, "snapshots is .*; valid values are auto, forks"),
    ({"pages": "many"}, "pages is not usable; "),
    ({"pages": -1}, "pages is not usable; "),
    ({"pages": 0}, "pages is 0; it must be 1 to"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN)
def test_options_that_are_not_known_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(_core.ConfigError, match=message):
        make_core(**options)


def test_what_is_no_dict_and_a_missing_option_are_refused() -> None:
    with pytest.raises(_core.ConfigError, match="options is not usable"):
        Core(SMALL, 7)  # type: ignore[arg-type]
    with pytest.raises(_core.ConfigError, match="pages is 0"):
        Core(SMALL, {"slabs": 1})


def test_options_and_policies_are_told_by_the_core() -> None:
    options = _core.default_options()
    Core(SMALL, options | {"pages": 8, "slabs": 1})  # the whole of it is taken back
    assert options["eviction"] in _core.EVICTIONS and options["snapshots"] in _core.SNAPSHOT_POLICIES
    for policy in _core.SNAPSHOT_POLICIES:
        make_core(snapshots=policy.replace(":N", ":256"))
    for eviction in _core.EVICTIONS:
        make_core(eviction=eviction)


BAD_LAYOUTS = [
    (("rank",), 2, 'layout is with the unknown key "rank"; did you mean'),
    (
        ("components", 0, "row_byte"),
        2,
        r'components\[0\] is with the unknown key "row_byte"; did you mean "row_bytes"',
    ),
    (
        ("components", 0, "kind"),
        {"strid": {"ratio": 4}},
        r'components\[0\].kind.* "strid"; did you mean "stride"',
    ),
    (("layers", 1, "history_of"), 2, r"layers\[1\].history_of is Some\(2\); layers that store"),
    (("layers", 1, "reach"), None, r"layers\[1\].reach is not usable"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_LAYOUTS)
def test_a_layout_with_what_is_not_known_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = SMALL.data()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(_core.ConfigError, match=message):
        LayoutSpec(data)


def test_buffers_that_do_not_do_are_refused_and_nothing_is_planned() -> None:
    core = make_core()
    words = core.plan_schema()["words"]
    core.submit(1, prompt(1, 2, 3), max_new=1)
    frozen = np.zeros(words, np.int32)
    frozen.flags.writeable = False
    bad = [
        (np.zeros(words, np.int64), "plan is of dtype int64; it must be a numpy array of dtype int32"),
        ([0] * words, "plan is .*list.*; it must be a numpy array of dtype int32"),
        (np.zeros((2, words), np.int32), r"plan is of shape \[2, \d+\]; it needs 1 dimension"),
        (np.zeros(2 * words, np.int32)[::2], "plan is strided; it must be contiguous"),
        (np.zeros(words - 1, np.int32), f"plan is {words - 1} words; it needs at least {words}"),
        (frozen, "plan is not available .*; it must be writable"),
    ]
    for out, message in bad:
        with pytest.raises(_core.ConfigError, match=message):
            core.plan(out)  # type: ignore[arg-type]
    assert core.stats()["in_flight"] == 0 and core.plan(np.zeros(words + 5, np.int32))


def test_the_schema_says_where_everything_lies() -> None:
    core = make_core()
    schema = core.plan_schema()
    limits = dict(slabs=SLABS, max_step_tokens=STEP_TOKENS, max_len=MAX_LEN)
    assert schema == plan_schema(SMALL, limits) == make_core(pages=9, max_waiting=3).plan_schema()
    places = {f["name"]: f for f in schema["fields"]}
    assert len(places) == len(schema["fields"])
    used = np.zeros(schema["words"], int)
    for place in places.values():
        size = (2 if place["dtype"] == "int64" else 1) * int(np.prod(place["shape"], dtype=int))
        used[place["offset"] : place["offset"] + size] += 1
        assert place["section"] == "header" or places[place["section"]]["section"] == "header"
        assert place["offset"] % (2 if place["dtype"] == "int64" else 1) == 0
    assert used.max() == 1 and used[-1] == 1
    assert places["token_ids"]["shape"] == places["positions"]["shape"] == [STEP_TOKENS]
    assert places["row_slab"]["shape"] == [SLABS] and places["page_deltas"]["shape"][1] == 3
    assert places["page_deltas"]["shape"][0] >= MAX_LEN // SMALL.block_tokens
    more = plan_schema(SMALL, limits | dict(max_step_tokens=STEP_TOKENS + 16))
    assert more["words"] == schema["words"] + 2 * 16  # ids and positions; fields start at multiples of 16


def test_a_plan_is_written_into_the_callers_buffer() -> None:
    core = make_core()
    plan, request = buffer(core), 7 + (3 << 32)
    core.submit(request, prompt(5, 6, 7), max_new=2)
    assert core.plan(plan.words)
    assert (plan.step, plan.rows, plan.tokens, plan.samples, plan.deltas) == (1, 1, 3, 1, 1)
    assert plan.token_ids.tolist() == [5, 6, 7] and plan.positions.tolist() == [0, 1, 2]
    row = [plan.row_req, plan.row_start, plan.row_len, plan.row_flags, plan.row_samples]
    assert [c.tolist() for c in row] == [[request], [0], [3], [RESET], [1]]
    assert plan.page_deltas.shape == (1, 3) and plan.copy_pages.shape[0] == plan.copies == 0
    assert np.shares_memory(plan.token_ids, plan.words) and np.shares_memory(plan.row_req, plan.words)
    with pytest.raises(AttributeError, match="a plan has no field 'row_request'"):
        _ = plan.row_request
    core.commit(plan.step, prompt(9), prompt(1))
    events = np.zeros((8, 6), np.int64)
    assert [events[i, [0, 1, 3]].tolist() for i in range(core.events(events))] == [
        [4, request, 0],
        [5, request, 3],
        [1, request, 9],
    ]
    assert core.stop(request) and not core.stop(request)
    assert core.events(events) == 1 and events[0, [0, 1, 3, 4, 5]].tolist() == [2, request, 1, 1, -1]


def test_accepted_counts_are_0_to_what_a_row_sampled() -> None:
    core = make_core()
    plan = buffer(core)
    for request in (1, 2):
        core.submit(request, prompt(5, 6, request), max_new=3)
    assert core.plan(plan.words) and plan.row_samples.tolist() == [1, 1]
    wrong = [
        (prompt(9), prompt(1), "step 1 samples 2 tokens, but 1 were committed"),
        (prompt(9, 9), prompt(1), "step 1 samples in 2 rows, but accepted has 1 counts"),
        (prompt(9, 9), prompt(1, 1, 1), "step 1 samples in 2 rows, but accepted has 3 counts"),
        (
            prompt(9, 9),
            prompt(1, 2),
            "step 1, row 1: 2 tokens are accepted; it sampled 1, so it must be 0 to 1",
        ),
        (prompt(9, 9), prompt(-1, 1), "step 1, row 0: -1 tokens are accepted; it sampled 1"),
    ]
    for tokens, accepted, message in wrong:
        with pytest.raises(_core.Dsv4Error, match=message):
            core.commit(plan.step, tokens, accepted)
    with pytest.raises(_core.ConfigError, match=r"accepted is of dtype int64; it must be .* of dtype int32"):
        core.commit(plan.step, prompt(9, 9), np.ones(2, np.int64))  # type: ignore[arg-type]
    # Nothing of request 2's row counts: it runs again, and its first token is still to come.
    core.commit(plan.step, prompt(9, 8), prompt(1, 0))
    core.check()
    assert core.stats()["rows_refused"] == 1 and core.stats()["waiting"] == 1
    assert core.plan(plan.words)
    assert plan.row_req.tolist() == [1, 2] and plan.row_start.tolist() == [3, 0]
    core.commit(plan.step, prompt(9, 7), prompt(1, 1))
    events = np.zeros((20, 6), np.int64)
    rows = events[: core.events(events)].tolist()
    said = [(request, token, index) for kind, request, _, token, index, _ in rows if kind == 1]
    assert said == [(1, 9, 0), (1, 9, 1), (2, 7, 0)]


def test_any_number_of_buffers_may_take_turns() -> None:
    """The core keeps no pointer: three buffers hold three steps in a row, and none is written but by its own plan."""
    core = make_core(max_in_flight=2)
    ring = [buffer(core) for _ in range(3)]
    core.submit(1, prompt(5, 6, 7), max_new=9)
    for turn in range(6):
        before = [p.words.copy() for p in ring]
        assert core.plan(ring[turn % 3].words) and ring[turn % 3].step == turn + 1
        unchanged = [np.array_equal(p.words, b) for p, b in zip(ring, before, strict=True)]
        assert unchanged == [i != turn % 3 for i in range(3)]
        if turn > 0:
            core.commit(turn, prompt(9), prompt(1))


@dataclass
class FakeEngine:
    """A loop over a model that samples a function of the input token and its position."""

    core: Core
    in_flight: int
    outputs: dict[int, list[int]] = field(default_factory=dict)
    _before: list[int] = field(default_factory=list)

    def submit(self, req: int, tokens: np.ndarray, **settings: Any) -> None:
        self.outputs[req] = []
        self.core.submit(req, tokens, **settings)

    def run(self) -> None:
        """Until everything is done."""
        plans = [buffer(self.core) for _ in range(self.in_flight)]
        pending: list[tuple[int, np.ndarray]] = []
        turn = 0
        while self.core.has_work() or pending:
            planned = self.core.plan(plans[turn].words)
            if planned:
                pending.append((plans[turn].step, self._forward(plans[turn])))
                turn = (turn + 1) % self.in_flight
            if len(pending) == self.in_flight or not planned:
                step, tokens = pending.pop(0)
                self.core.commit(step, tokens, np.ones_like(tokens))
            self.core.check()
            self._drain()

    def _forward(self, plan: StepPlan) -> np.ndarray:
        ids = plan.token_ids.copy()
        unknown = np.flatnonzero(ids < 0)
        ids[unknown] = [self._before[-1 - i] for i in ids[unknown]]
        ends = np.cumsum(plan.row_len)[plan.row_samples > 0] - 1
        sampled = (ids[ends] * 31 + plan.positions[ends] * 7 + 1) % 101
        self._before = sampled.tolist()
        return sampled.astype(np.int32)

    def _drain(self) -> None:
        events = np.zeros((3, 6), np.int64)
        while n := self.core.events(events):
            for kind, req, _step, a, b, _c in events[:n].tolist():
                if kind == 1:
                    assert b == len(self.outputs[req])
                    self.outputs[req].append(a)


def expected(tokens: np.ndarray, max_new: int, stop: list[int]) -> list[int]:
    """What the fake model gives for one request alone."""
    last, out = int(tokens[-1]), []
    for position in range(len(tokens) - 1, len(tokens) - 1 + max_new):
        last = (last * 31 + position * 7 + 1) % 101
        out.append(last)
        if last in stop:
            break
    return out


@pytest.mark.parametrize("pages", [9, 64])
@pytest.mark.parametrize("snapshots", ["none", "every:128", "turns", "forks"])
def test_both_loops_give_the_outputs_of_each_request_alone(pages: int, snapshots: str) -> None:
    prompts = {req: (np.arange(100 + 37 * req) % (90 + req // 4)).astype(np.int32) for req in range(1, 17)}

    def stop(req: int) -> list[int]:
        return [7] if req % 4 == 0 else []

    for in_flight in (1, 2):
        core = make_core(pages=pages, snapshots=snapshots, max_in_flight=in_flight)
        engine = FakeEngine(core, in_flight)
        for req, tokens in prompts.items():
            engine.submit(req, tokens, max_new=100 + 14 * req, stop_ids=stop(req), priority=req % 2)
        engine.run()
        assert engine.outputs == {req: expected(p, 100 + 14 * req, stop(req)) for req, p in prompts.items()}
        core.clear_prefix()
        stats = core.stats()
        assert (stats["free_pages"], stats["free_slabs"], stats["running"]) == (pages, SLABS, 0)
        if pages == 9:
            assert stats["preemptions"] > 0


def test_a_second_request_is_explained_by_the_first() -> None:
    engine = FakeEngine(make_core(snapshots="turns"), 1)
    tokens = np.arange(300, dtype=np.int32)
    for req in (1, 2):
        engine.submit(req, tokens, max_new=1)
        engine.run()
    cold, warm = engine.core.explain(1), engine.core.explain(2)
    assert (cold["reason"], cold["cached_tokens"]) == ("never_stored", 0)
    assert warm == {
        "prompt_tokens": 300,
        "history_matched": 256,
        "resumed_at": 256,
        "replayed": 0,
        "cached_tokens": 256,
        "reason": "none",
        "preemptions": 0,
    }
    assert engine.core.evict_snapshots(9) == 1
    engine.submit(3, tokens, max_new=1)
    engine.submit(4, tokens, max_new=1, salt=b"someone else")
    engine.submit(5, tokens[:100], max_new=1)
    engine.submit(6, tokens, max_new=1, all_logits=True)
    engine.run()
    assert [engine.core.explain(r)["reason"] for r in (3, 4, 5, 6)] == [
        "snapshot_evicted",
        "salt",
        "below_block",
        "disabled",
    ]
    assert engine.core.forget(1) and not engine.core.forget(1)
    with pytest.raises(_core.UnknownRequest):
        engine.core.explain(1)


def test_a_prompt_alone_finishes_without_a_token() -> None:
    engine = FakeEngine(make_core(), 1)
    engine.submit(1, prompt(*range(250)), max_new=0)
    engine.run()
    assert engine.outputs == {1: []} and engine.core.stats()["finished"] == 1


def test_threads_may_submit_and_abort_while_another_one_plans() -> None:
    core = make_core(max_waiting=10_000)

    def client(base: int) -> None:
        for req in range(base, base + 200):
            core.submit(req, prompt(1, 2, 3, req % 5), max_new=3)
            if req % 3 == 0:
                core.abort(req)

    threads = [threading.Thread(target=client, args=(1000 * i,)) for i in range(1, 5)]
    for t in threads:
        t.start()
    plan = buffer(core)
    while any(t.is_alive() for t in threads) or core.has_work():
        if core.plan(plan.words):
            core.commit(plan.step, np.zeros(plan.samples, np.int32), np.ones(plan.samples, np.int32))
    core.check()
    assert core.stats()["finished"] == 800


def test_the_budget_of_a_step_is_told_while_requests_decode() -> None:
    core = make_core(step_budget={"fixed": 5000.0})
    plan = buffer(core)
    budgets = []
    core.submit(1, prompt(1, 2, 3), max_new=3, stop_ids=[])
    while core.plan(plan.words):
        budgets.append(core.stats()["step_budget_us"])
        sampled = int(plan.row_samples.sum())
        core.commit(plan.step, np.full(sampled, 7, np.int32), np.ones(sampled, np.int32))
    assert budgets == [0, 5000, 5000]
