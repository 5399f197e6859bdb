"""Sampling: distributions, order of the filters, independence of the batch, and refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dsv4.backends import choose
from dsv4.engine.request import Sampled
from dsv4.engine.sampler import Sampler, judge
from dsv4.ops.reference.sample import draws as draws_of
from dsv4.sampling import Grammar, SamplingParams

EOS = 1


@dataclass
class State:
    """A request as the sampler is told of it."""

    seed: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    params: SamplingParams

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output) - 1


def state(
    seed: int = 0, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: object
) -> State:
    return State(seed, prompt, output, SamplingParams(**params))


def begun(states: list[State], vocab: int) -> Sampler:
    """A sampler with each state at the slab of its number."""
    sampler = Sampler(choose("reference"), len(states), vocab, "cpu")
    for slab, s in enumerate(states):
        ends = [EOS, *s.params.stop_token_ids]
        prompt = np.array(s.prompt, np.int32)
        sampler.begin(slab, s.params, prompt=prompt, output=s.output, seed=s.seed, ends=ends)
    return sampler


def sample(rows: torch.Tensor, states: list[State]) -> list[Sampled]:
    """One token for each row; -2 where the logits are not finite."""
    at = np.arange(len(states)), np.array([s.position for s in states])
    drawn = begun(states, rows.shape[1]).draw(rows, *at)
    judged = drawn.sampled()
    return [judged.get(i) or Sampled(token) for i, token in enumerate(drawn.tokens.tolist())]


def edited(rows: torch.Tensor, states: list[State]) -> torch.Tensor:
    """The logits that are drawn from."""
    seen = []
    sampler = begun(states, rows.shape[1])
    plain = sampler._ops.sample
    sampler._ops = SimpleNamespace(
        edit_logits=sampler._ops.edit_logits,
        sample=lambda logits, *a: seen.append(logits) or plain(logits, *a),
    )
    sampler.draw(rows, np.arange(len(states)), np.array([s.position for s in states]))
    return seen[0]


def logits(n: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def draws(row: torch.Tensor, n: int, **params: object) -> torch.Tensor:
    """Frequencies of n tokens under different seeds."""
    tokens = [s.token for s in sample(row.expand(n, -1), [state(seed, **params) for seed in range(n)])]
    return torch.bincount(torch.tensor(tokens), minlength=len(row)) / n


def test_greedy_takes_the_lowest_of_equals() -> None:
    row = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(row, [state(temperature=0)])[0].token == 1


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_frequencies_follow_the_filtered_distribution(params: dict) -> None:
    row = logits(1, 12)[0]
    p = torch.softmax(row.double() / params.get("temperature", 1.0), 0)
    p = torch.where(p >= params.get("min_p", 0) * p.max(), p, 0)
    order = p.argsort(descending=True)
    order = order[: params.get("top_k", len(p))]
    kept, total = [], 0.0
    for i in order.tolist():
        if total < params.get("top_p", 1.0) * float(p[order].sum()):
            kept.append(i)
        total += float(p[i])
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    n = 3000
    got = draws(row, n, **params)
    assert not got[expected == 0].any()
    used = expected > 0
    chi = (n * (got[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi < int(used.sum()) + 5 * math.sqrt(2 * int(used.sum())) + 5, float(chi)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_k": 700},
        {"top_p": 0.6},
        {"top_p": 0.999, "min_p": 1e-5},
        {"top_k": 300, "top_p": 0.9},
    ],
)
def test_partial_selection_keeps_what_a_sort_keeps(params: dict, ties: bool) -> None:
    """A vocabulary larger than the first look, one token for each of many draws, against a sort of all."""
    row = logits(1, 3000, seed=3)[0]
    row = row.mul(2).round() if ties else row
    weight = torch.softmax(row.double(), 0)
    order = torch.tensor(sorted(range(3000), key=lambda i: (-float(row[i]), i)))
    order = order[weight[order] >= params.get("min_p", 0) * weight.max()][: params.get("top_k", 3000)]
    before = weight[order].cumsum(0) - weight[order]
    kept = order[before < params.get("top_p", 1.0) * weight[order].sum()].sort().values
    total = weight[kept].cumsum(0)
    for seed in range(30):
        s = state(seed, **params)
        uniform = draws_of(np.array([seed]), np.array([s.position]))[0]
        expected = kept[torch.searchsorted(total, uniform * total[-1], right=True)]
        assert sample(row[None], [s])[0].token == int(expected)


def test_draws_are_philox() -> None:
    """Known answers of Philox4x32-10 (kat_vectors of Random123): counter and key of zeros, and of ones."""
    first = [(0x6627E8D5, 0xE169C58D), (0x408F276D, 0x41C83B0E)]
    expected = [((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in first]
    assert draws_of(np.array([0]), np.array([0]))[0] == expected[0]
    many = draws_of(np.arange(10_000), np.full(10_000, 3))
    assert abs(many.mean() - 0.5) < 0.02 and len(set(many.tolist())) == 10_000


def test_a_row_does_not_depend_on_the_batch() -> None:
    rows, many = (
        logits(6),
        [dict(temperature=0.8, top_p=0.9), dict(top_k=4), dict(temperature=0), {}, dict(min_p=0.1), {}],
    )
    together = sample(rows, [state(i, logprobs=3, **p) for i, p in enumerate(many)])
    alone = [sample(rows[i : i + 1], [state(i, logprobs=3, **p)])[0] for i, p in enumerate(many)]
    assert together == alone


def test_the_seed_and_the_position_decide_the_draw() -> None:
    row = logits(1)
    outputs = [tuple(range(i)) for i in range(8)]
    first = [sample(row, [state(7, output=o)])[0].token for o in outputs]
    assert len(set(first)) > 1
    assert first == [s.token for s in sample(row.expand(8, -1), [state(7, output=o) for o in outputs])]
    assert first != [sample(row, [state(8, output=o)])[0].token for o in outputs]


def test_penalties_bias_and_minimum_length() -> None:
    row = torch.tensor([[1.0, 5.0, 2.0, -1.0]])
    plain = state(temperature=0)
    assert edited(row, [plain]) is row
    states = [
        state(repetition_penalty=2.0, prompt=(3, 3), output=(1,)),
        state(presence_penalty=1.0, output=(2, 2)),
        plain,
        state(frequency_penalty=1.0, output=(2, 2)),
        state(logit_bias={0: 9, 99: 1}),
        state(logit_bias={1: 1}, repetition_penalty=2.0, presence_penalty=0.5, output=(1,), min_tokens=2),
        state(min_tokens=1, stop_token_ids=(2, 77)),
    ]
    expected = [
        [1, 2.5, 2, -2], [1, 5, 1, -1], [1, 5, 2, -1], [1, 5, 0, -1], [10, 5, 2, -1], [0.5, -math.inf, 2, -1],
        [1, -math.inf, -math.inf, -1],
    ]  # fmt: skip
    before = row.expand(7, 4).clone()
    assert edited(before, states).tolist() == expected
    assert torch.equal(before, row.expand(7, 4))
    assert edited(row, [states[5]])[0, 1] == -math.inf
    states[5].output += (1,)
    assert edited(row, [states[5]])[0, 1] == (5 + 1) / 2 - 0.5
    assert sample(row, [state(temperature=0, min_tokens=2)])[0].token == 2  # 1 is the end token
    assert sample(row, [state(temperature=0, min_tokens=2, output=(0, 0))])[0].token == 1


def test_what_is_written_counts_at_once_and_a_slab_forgets_who_was_there() -> None:
    row = torch.tensor([[3.0, 0.0, 2.5, -9.0]])
    one = state(temperature=0, frequency_penalty=1.0)
    sampler, at = begun([one], 4), np.array([0])
    tokens = [int(sampler.draw(row, at, at + i).tokens[0]) for i in range(5)]
    assert tokens == [0, 2, 0, 2, 0]
    for said, expected in (((), 0), ((0, 2, 0), 2)):
        sampler.begin(0, one.params, prompt=np.array([5], np.int32), output=said, seed=0, ends=[])
        assert int(sampler.draw(row, at, at).tokens[0]) == expected


def test_logprobs_are_the_models_own() -> None:
    row = logits(1)[0]
    expected = torch.log_softmax(row, 0)
    got = sample(row[None], [state(3, temperature=0.3, top_k=2, logit_bias={4: -5}, logprobs=5)])[0]
    assert got.logprob == pytest.approx(float(expected[got.token])) and len(got.top) == 5
    assert [t for t, _ in got.top] == expected.argsort(descending=True)[:5].tolist()
    assert got.rank == int((row > row[got.token]).sum()) + 1
    tied = judge(torch.zeros((1, 9)), torch.tensor([3]), 4).sampled([3], [4])[0]
    assert [t for t, _ in tied.top] == [0, 1, 2, 3]


def test_a_poisoned_row_fails_alone() -> None:
    rows = logits(3)
    rows[1, 7] = math.nan
    got = sample(rows, [state(i) for i in range(3)])
    assert got[1].token == -2 and got[0].token >= 0 and got[2].token >= 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "1"), ("temperature", True), ("temperature", 1e308),
        ("top_p", 0), ("top_p", 1.1), ("min_p", -1), ("top_k", -2), ("top_k", 1.5), ("max_tokens", -1), ("min_tokens", 17),
        ("seed", 2**64), ("seed", True), ("logprobs", 21), ("presence_penalty", 3), ("frequency_penalty", math.inf),
        ("repetition_penalty", 0), ("stop", ["x"] * 17), ("stop", [""]), ("stop_token_ids", [-1]), ("logit_bias", {1: 101}),
        ("logit_bias", {"a": 1}), ("min_tokens", None),
    ],
)  # fmt: skip
def test_bad_values_are_one_line_with_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError) as e:
        SamplingParams(**{field: value})
    assert str(e.value).startswith(field) and "\n" not in str(e.value)


ANY = Grammar("start: /.*/", "response_format")


def bits_of(*rows: tuple[int, ...], vocab: int = 50) -> np.ndarray:
    """Masks that take these tokens."""
    masks = np.zeros((len(rows), -(-vocab // 32)), np.int32)
    for mask, tokens in zip(masks, rows, strict=True):
        for token in tokens:
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    return masks


def test_rows_with_a_grammar_take_what_their_mask_has_and_others_all() -> None:
    rows = logits(3)
    states = [state(7, grammar=ANY), state(7), state(7, grammar=ANY, logit_bias={3: 100.0}, min_tokens=9)]
    sampler, plain = begun(states, 50), begun([state(7), state(7), state(7)], 50)
    sampler.constrain(np.array([0, 2]), bits_of((31, 49), (EOS, 40)))
    at = np.arange(3), np.zeros(3, int)
    tokens = sampler.draw(rows.clone(), *at).tokens.tolist()
    assert tokens[0] in (31, 49) and tokens[2] in (EOS, 40)  # a bias and a minimum do not lead out of it
    assert tokens[1] == plain.draw(rows.clone(), *at).tokens.tolist()[1]


def test_log_probabilities_are_those_without_a_mask() -> None:
    rows = logits(1)
    with_mask, without = state(logprobs=3, grammar=ANY), state(logprobs=3)
    sampler = begun([with_mask], 50)
    sampler.constrain(np.array([0]), bits_of((5,)))
    drawn = sampler.draw(rows.clone(), np.array([0]), np.array([0])).sampled()[0]
    assert drawn.token == 5 and drawn.logprob == float(torch.log_softmax(rows, -1)[0, 5])
    assert drawn.top == begun([without], 50).draw(rows.clone(), np.array([0]), np.array([0])).sampled()[0].top


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_is_known_under_a_mask(broken: float) -> None:
    rows = logits(1)
    rows[0, 7] = broken
    sampler = begun([state(grammar=ANY)], 50)
    sampler.constrain(np.array([0]), bits_of((5,)))
    assert sampler.draw(rows, np.array([0]), np.array([0])).tokens.tolist() == [-2]
