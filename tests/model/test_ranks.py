"""The model on R ranks over gloo: every way of reuse is the cold run of the same R, bit for bit, and R ranks give the logits of
one within a tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4.backends import choose
from dsv4.cache.sharded import ShardedCache
from dsv4.model.batch import Batch, Row
from dsv4.model.config import ModelConfig
from dsv4.model.rank import Rank, ordered
from dsv4.model.ranked import RankedModel, share
from dsv4.model.weights import load_weights
from dsv4.text.tokenizer import Tokenizer
from torch import Tensor

from tests.record_golden import GOLDEN, NANO, cases, prompt_ids
from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights
from tests.support.ranks import RankDriver, run_ranks

TOKENS = 600
TOLERANCE = 2e-4
"""Largest difference of logits (of a spread near 1.5) between R ranks and one, in float32."""

SHAPES: dict[int, tuple[str, dict[str, Any]]] = {
    2: ("flash", dict(compress_ratios=[0, 4, 128, 4], index_topk=16)),
    3: (
        "flash",
        dict(
            compress_ratios=[0, 4, 128, 4],
            index_topk=16,
            num_attention_heads=6,
            o_groups=3,
            moe_intermediate_size=96,
        ),
    ),
    4: ("pro", dict(compress_ratios=[128, 4, 128, 4], index_topk=16, o_groups=4, moe_intermediate_size=128)),
}


def _config(ranks: int) -> ModelConfig:
    kind, changes = SHAPES[ranks]
    return random_config(kind, **changes)


def _driver(rank: Rank, **options: Any) -> RankDriver:
    config = _config(rank.ranks)
    weights = random_weights(config, seed=9)
    return RankDriver(
        config, weights, slabs=2, max_len=1024, block_tokens=128 * rank.ranks, rank=rank, **options
    )


def _share_history(driver: Driver, upto: int) -> None:
    blocks = upto // driver.block_tokens
    driver.page_table[1, :blocks] = driver.page_table[0, :blocks]


def _ways(rank: Rank, cold: Tensor) -> dict[str, Any]:
    """Logits of every other way to the same tokens, and of the cold run."""
    driver = _driver(rank)
    ids, block = random_tokens(driver.config, TOKENS), driver.block_tokens
    boundary = TOKENS // block * block
    found = {"chunked": (driver.run(ids, [300, 33, 1, 250]), cold)}

    before = driver.run(ids[:boundary], [boundary - 100, 100])
    pages = driver.spare[: driver.cache.layout.snapshot_pages][::-1]
    driver.cache.save(0, boundary, pages)
    found["cut elsewhere"] = (before, cold[:boundary])

    driver.run(random_tokens(driver.config, 200, seed=99), slab=1)  # leaves another state there
    _share_history(driver, boundary)
    driver.cache.restore(1, boundary, pages)
    found["restored"] = (driver.run(ids, [1, 7], start=boundary, slab=1), cold[boundary:])
    return found


def _replays(rank: Rank) -> dict[str, Any]:
    driver = _driver(rank)
    ids, block = random_tokens(driver.config, TOKENS), driver.block_tokens
    boundary = TOKENS // block * block
    cold = driver.run(ids)
    driver.run(random_tokens(driver.config, 200, seed=99), slab=1)
    _share_history(driver, boundary)
    history = driver.cache.pages.clone()
    driver.replay(ids, boundary, driver.layout.replay_tokens, [boundary], slab=1)
    assert torch.equal(driver.cache.pages, history)  # a replay writes none
    found = {"replayed": (driver.run(ids, [3, 1, 80], start=boundary, slab=1), cold[boundary:])}
    driver.replay(ids, boundary, driver.layout.replay_tokens, [150, 33], slab=1)
    found["replayed in pieces"] = (driver.run(ids, start=boundary, slab=1), cold[boundary:])
    return found


def _mixed(rank: Rank, cold: Tensor) -> dict[str, Any]:
    """A token of one request beside a chunk of another, a state saved inside a block, and one rank with all chosen entries."""
    driver = _driver(rank)
    ids, others = (random_tokens(driver.config, TOKENS, seed=s) for s in (0, 5))
    cold_others = driver.run(others, slab=1)
    driver.run(ids[:330], slab=0)
    a, b = driver.step([Chunk(0, ids[330:331], 330), Chunk(1, others[:450], 0)])
    c, d = driver.step([Chunk(1, others[450:], 450), Chunk(0, ids[331:340], 331)])
    found = {
        "decoded beside a chunk": (torch.cat((a, d)), cold[330:340]),
        "a chunk beside decode": (torch.cat((b, c)), cold_others),
    }
    pages = driver.spare[: driver.cache.layout.slab_pages]
    driver.cache.save(0, 340, pages)
    driver.run(random_tokens(driver.config, 64, seed=98), slab=0)
    driver.run(ids[:340], slab=0)  # the history, which that has overwritten
    driver.cache.slabs[0] = 0
    driver.cache.restore(0, 340, pages)
    found["restored inside a block"] = (driver.run(ids[:400], [20, 1], start=340), cold[340:400])
    one, at, none = ids[400:401], torch.tensor([400]), torch.zeros(1, dtype=torch.int64)
    streams = driver.model.decode(one, at, torch.tensor([0]), driver.page_table, none, 1024)
    found["tables made on the device"] = (driver.model.logits(streams), cold[400:401])
    return found


def _several(rank: Rank) -> dict[str, Any]:
    """Two prompts that are cut, one that is too short for that, and a token of another."""
    config = _config(rank.ranks)
    driver = RankDriver(
        config,
        random_weights(config, seed=9),
        slabs=4,
        max_len=1024,
        block_tokens=128 * rank.ranks,
        rank=rank,
    )
    ids = [random_tokens(config, 400, seed=s) for s in range(4)]
    at, ends = [130, 0, 7, 331], [400, 200, 27, 332]
    cold = [driver.run(ids[s], slab=s)[at[s] : ends[s]] for s in range(4)]
    for s, start in enumerate(at):
        driver.run(ids[s][:start], slab=s) if start else None
    found = driver.step([Chunk(s, ids[s][at[s] : ends[s]], at[s]) for s in (2, 0, 3, 1)])
    return {f"row {s} of several": (found[i], cold[s]) for i, s in enumerate((2, 0, 3, 1))}


def _all(rank: Rank) -> tuple[Tensor, dict[str, tuple[float, bool]]]:
    ids = random_tokens(_config(rank.ranks), TOKENS)
    cold = _driver(rank).run(ids)
    found = _ways(rank, cold) | _replays(rank) | _mixed(rank, cold) | _several(rank)
    logits = _driver(rank, unit=128).run(ids)  # an entry of 128 tokens lies within a run now
    found["in longer runs"] = logits, cold
    found["in longer runs, in chunks"] = _driver(rank, unit=128).run(ids, [530, 70]), logits
    return logits, {n: (float((a - b).abs().max()), torch.equal(a, b)) for n, (a, b) in found.items()}


@pytest.mark.parametrize("ranks", SHAPES)
def test_ranks(ranks: int, tmp_path: Path) -> None:
    answers = run_ranks(ranks, _all, tmp_path)
    for logits, ways in answers:
        assert len(ways) == 15 and all(same for _, same in ways.values()), ways
        assert torch.equal(logits, answers[0][0])  # on every rank
    config = _config(ranks)
    one = Driver(config, random_weights(config, seed=9), max_len=1024).run(random_tokens(config, TOKENS))
    difference = (answers[0][0] - one).abs().max()
    assert difference <= TOLERANCE * one.std(), difference
    assert torch.equal(answers[0][0].argmax(-1), one.argmax(-1))


def _crossing(rank: Rank) -> tuple[bool, int, int]:
    """Whether a prompt's logits are those of ranks that gather every compressor input, and the bytes that a rank hears with and
    without that."""
    ids, heard, logits = random_tokens(_config(2), 512), [], []
    gather = rank.gather
    for folds in (True, False):
        driver, count = _driver(rank, unit=128), [0]

        def counted(x: Tensor, out: Tensor | None = None, *, count: list[int] = count) -> Tensor:
            count[0] += x.nbytes
            return gather(x, out)

        rank.gather = counted  # type: ignore[method-assign]
        if not folds:
            driver.model.foldable = {}  # type: ignore[attr-defined]
        logits.append(driver.run(ids))
        heard.append(count[0])
        rank.gather = gather  # type: ignore[method-assign]
    return torch.equal(*logits), *heard


def test_of_compressor_inputs_only_the_tails_cross(tmp_path: Path) -> None:
    config = _config(2)
    inputs = (
        0  # float32 of the 256 tokens of a rank: values and scores, two halves each where entries overlap
    )
    for spec in config.layers:
        dims = config.head_dim + (config.index_head_dim if spec.indexed else 0)
        inputs += 256 * 4 * 2 * (1 + spec.overlap) * dims if spec.stores else 0
    for same, folded, gathered in run_ranks(2, _crossing, tmp_path):
        assert same
        assert gathered - folded > 0.75 * inputs, (gathered, folded, inputs)


def _prefer(ops: Any, holder: int, ranks: int) -> list[int]:
    """Has the indexer score what `holder` has above all else. What comes of it is in the list that is given: of each call of attention
    over chosen entries of this rank, the most that a token has."""
    merge, candidates, attend = ops.merge_candidates, ops.index_candidates, ops.partial_attention
    found: list[int] = []

    def merged(selected: Tensor, scores: Tensor, topk: int) -> Tensor:
        better = scores.double() + 1e6 * (torch.arange(len(scores)) == holder)[:, None, None]
        return merge(selected, better, topk)

    def selected(*args: Any) -> Tensor:
        *rest, entries, topk = args
        every, scores = candidates(*rest, entries, entries.most)
        better = scores.double() + 1e6 * (every % ranks == holder)
        return merge(every[None], better[None], min(topk, entries.most))

    def attended(*args: Any) -> Any:
        if len(args) > 7 and args[7] is not None:
            found.append(int((args[7] >= 0).sum(-1).max()))
        return attend(*args)

    ops.merge_candidates, ops.index_select, ops.partial_attention = merged, selected, attended
    return found


CLEAR = 4
"""A seed of tokens whose choices are clear: the last entry that is chosen and the next are 6e-4 apart at least, in scores of up to 80. Of
some other tokens these are equal to rounding, and then one GPU and two ranks may choose differently."""


def _held_by_one(rank: Rank, holder: int) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of a prompt that ranks cut and of a token that they share, from tables made on the device as a graph has them; and of
    the latter how many chosen entries this rank has in each layer with an index."""
    driver = _driver(rank)
    ids, found = random_tokens(driver.config, TOKENS, CLEAR), _prefer(driver.model.ops, holder, rank.ranks)
    prompt = driver.run(ids[: TOKENS - 1])
    found.clear()
    last, none = torch.tensor([TOKENS - 1]), torch.zeros(1, dtype=torch.int64)
    streams = driver.model.decode(ids[-1:], last, torch.tensor([0]), driver.page_table, none, 1024)
    return prompt, driver.model.logits(streams), found


@pytest.mark.parametrize("holder", [0, 1])
def test_one_rank_may_have_all_entries_that_a_token_chose(holder: int, tmp_path: Path) -> None:
    config = _config(2)
    one = Driver(config, random_weights(config, seed=9), max_len=1024)
    plain = one.run(random_tokens(config, TOKENS, CLEAR))
    _prefer(one.model.ops, holder, 2)
    expected = one.run(random_tokens(config, TOKENS, CLEAR))
    assert not torch.equal(plain[-1], expected[-1])  # it is a choice that no index would make
    for rank, (prompt, last, found) in enumerate(run_ranks(2, _held_by_one, tmp_path, holder)):
        assert found == [config.index_topk if rank == holder else 0] * 2
        for ours, theirs in ((prompt, expected[:-1]), (last, expected[-1:])):
            assert (ours - theirs).abs().max() <= TOLERANCE * expected.std()


def _says(rank: Rank) -> dict[str, Tensor]:
    x = torch.arange(6.0).view(2, 3).bfloat16() + 10 * rank.rank
    to_all = torch.arange(rank.ranks * 2).view(rank.ranks, 2) + 100 * rank.rank
    return {
        "gather": rank.gather(x),
        "exchange": rank.exchange(to_all),
        "sum": rank.sum(x),
        "nothing": rank.gather(x[:0]),
    }


def test_what_ranks_say(tmp_path: Path) -> None:
    answers = run_ranks(2, _says, tmp_path)
    x = torch.arange(6.0).view(2, 3).bfloat16()
    for rank, found in enumerate(answers):
        assert torch.equal(found["gather"], torch.stack((x, x + 10)))
        assert found["exchange"].tolist() == [[2 * rank + p * 100, 2 * rank + 1 + p * 100] for p in range(2)]
        assert torch.equal(found["sum"], ordered(torch.stack((x, x + 10))))
        assert found["nothing"].shape == (2, 0, 3)


def _nano(rank: Rank, prompts: dict[str, Tensor], lengths: dict[str, int]) -> dict[str, list[int]]:
    """Greedy tokens of the model that ships, each prompt in one chunk (cut where it is long enough)."""
    config = ModelConfig.from_dir(Path(str(NANO)))
    weights = load_weights(Path(str(NANO)), config, torch.float32, share=share(rank))
    layout = config.layout("float32", "float32", block_tokens=256, ranks=rank.ranks)
    blocks = -(-8192 // 256)
    cache = ShardedCache(layout, blocks, 1, rank.rank, rank.gather)
    model = RankedModel(config, weights, cache, choose("reference"), rank)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    written: dict[str, list[int]] = {}
    for name, ids in prompts.items():
        out: list[int] = []
        at, new = 0, ids
        while len(out) < lengths[name]:
            n = len(new)
            row = Row(0, at, n, 0, reset=at == 0)
            batch = Batch(new, torch.arange(at, at + n), (row,), table, torch.tensor([n - 1]))
            out.append(int(model.forward(batch)[0].argmax()))
            at, new = at + n, torch.tensor(out[-1:])
        written[name] = out
    return written


def test_the_model_that_ships_writes_the_same_on_two_ranks(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    config = ModelConfig.from_dir(Path(str(NANO)))
    tokenizer = Tokenizer.from_dir(str(NANO), vocab_size=config.vocab_size)
    assert tokenizer is not None
    prompts = {name: torch.tensor(prompt_ids(case, tokenizer, config)) for name, case in cases().items()}
    assert max(map(len, prompts.values())) > 4000  # cut, and with more entries than are chosen
    lengths = {name: min(12, len(golden[name]["ids"])) for name in prompts}
    for written in run_ranks(2, _nano, tmp_path, prompts, lengths):
        assert written == {name: golden[name]["ids"][: lengths[name]] for name in prompts}
