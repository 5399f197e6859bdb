"""The forward against `transformers` in float32, every parameter random (its initialisation hides bugs)."""

from __future__ import annotations

import pytest
import torch
from dsv4.model.config import ModelConfig
from dsv4.ops.reference.norm import rope
from dsv4.ops.tables import EntryTable, RowSource, TokenTable
from torch import Tensor

from tests.support.driving import Driver, random_tokens
from tests.support.models import hf_twin, random_config, random_weights

TOKENS = 720
TOLERANCE = 1e-4

CONFIGS = {
    "flash": ("flash", {}),
    "flash-wide-heads": (
        "flash",
        dict(
            num_attention_heads=4,
            head_dim=128,
            qk_rope_head_dim=64,
            index_head_dim=128,
            index_n_heads=8,
            o_groups=4,
            num_hash_layers=3,
            num_experts_per_tok=3,
            routed_scaling_factor=2.5,
        ),
    ),
    "flash-short": (
        "flash",
        dict(
            compress_ratios=[0, 0, 4],
            num_hash_layers=0,
            swiglu_limit=0.5,
            rope_scaling=None,
            sliding_window=40,
        ),
    ),
    "pro": ("pro", {}),
    "pro-long": (
        "pro",
        dict(
            compress_ratios=[128, 128, 4, 128, 4, 128, 4],
            num_attention_heads=16,
            o_groups=4,
            n_routed_experts=12,
        ),
    ),
}


def _build(name: str, **overrides: object) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    kind, own = CONFIGS[name]
    config = random_config(kind, **{**own, **overrides})
    return config, random_weights(config, seed=len(name)), random_tokens(config, TOKENS, seed=7)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_shot_when_every_entry_is_selected(name: str) -> None:
    config, weights, ids = _build(name)
    with torch.no_grad():
        expected = hf_twin(config, weights)(ids[None], use_cache=False).logits[0]
    got = Driver(config, weights).run(ids)
    assert expected.std() > 0.5  # random weights that say something
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_binding_topk(name: str) -> None:
    """With index_topk 16 of up to 180 entries the two may choose differently where scores are equal to
    rounding, and from there on everything differs. So two things are compared: (1) our logits before the
    first position where any layer chose another set; (2) with the choices of `transformers` imposed, the
    logits of all positions, and our own choice on the same inputs: entries chosen by one side alone must
    score within 1e-5 of each other, as `transformers` scales scores."""
    config, weights, ids = _build(name, index_topk=16)
    theirs: list[list[set[int]]] = []
    twin = hf_twin(config, weights)
    for module in twin.modules():
        if type(module).__name__ == "DeepseekV4Indexer":
            module.register_forward_hook(
                lambda _, __, out: theirs.append([set(r) - {-1} for r in out[0].tolist()])
            )
    with torch.no_grad():
        expected = twin(ids[None], use_cache=False).logits[0]

    ours = _Choices(Driver(config, weights))
    difference = (ours.driver.run(ids) - expected).abs().amax(-1)
    first = min(
        (t for a, b in zip(theirs, ours.sets, strict=True) for t in range(TOKENS) if a[t] != b[t]),
        default=TOKENS,
    )
    assert first > 4 * config.index_topk, "the top-k never binds before the choices part"
    assert difference[:first].max() <= TOLERANCE

    imposed = _Choices(Driver(config, weights), impose=theirs)
    assert (imposed.driver.run(ids) - expected).abs().max() <= TOLERANCE
    assert imposed.largest_gap <= 1e-5


class _Choices:
    """Watches (and with `impose` replaces) what the indexer of each layer selects."""

    def __init__(self, driver: Driver, impose: list[list[set[int]]] | None = None) -> None:
        self.driver, self.impose = driver, impose
        self.sets: list[list[set[int]]] = []
        self.largest_gap = 0.0
        ops = driver.model.ops
        self._select = ops.index_select
        ops.index_select = self  # type: ignore[method-assign]

    def __call__(
        self,
        q: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: Tensor,
        keys: RowSource,
        tokens: TokenTable,
        entries: EntryTable,
        topk: int,
    ) -> Tensor:
        selected = self._select(q, cos, sin, weights, keys, tokens, entries, topk)
        mine = [set(r) - {-1} for r in selected.tolist()]
        self.sets.append(mine)
        if self.impose is None:
            return selected
        forced = self.impose[len(self.sets) - 1]
        every = entries.locate(tokens.slab[:1], torch.arange(entries.most))
        dots = torch.einsum("thd,ed->the", rope(q, cos, sin), keys.read(every)).relu()
        scores = torch.einsum("th,the->te", weights, dots) * (q.shape[1] * q.shape[2]) ** -0.5
        for t, (a, b) in enumerate(zip(mine, forced, strict=True)):
            if a != b:
                odd = scores[t, sorted(a ^ b)]
                self.largest_gap = max(self.largest_gap, float(odd.max() - odd.min()))
        ids = [sorted(s) + [-1] * (selected.shape[1] - len(s)) for s in forced]
        return torch.tensor(ids, dtype=torch.int32)


def test_bfloat16_stays_near_float32() -> None:
    """The same bfloat16 weights in both: activations in bfloat16 here, in float32 there. The median, as a
    router that flips between two near experts moves single tokens far."""
    config = random_config("flash")
    weights = random_weights(config, seed=3, dtype=torch.bfloat16)
    ids = random_tokens(config, 300)
    with torch.no_grad():
        expected = hf_twin(config, weights)(ids[None], use_cache=False).logits[0]
    got = Driver(config, weights).run(ids)
    assert got.dtype == torch.float32
    assert (got - expected).abs().median() < 0.05 * expected.std()
