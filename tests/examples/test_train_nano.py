"""The training code of the small model (examples/train_nano) against the engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release
from dsv4.model.weights import load_weights

from tests.support.driving import Driver, random_tokens

HERE = Path(__file__).parents[2] / "examples" / "train_nano"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Any:
    """Its modules are flat files beside each other, as a script sees them."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    from config import CONFIG

    return {**CONFIG, "vocab_size": 256, "moe_intermediate_size": 128}


def random_model(raw: dict[str, Any]) -> Any:
    from model import Nano, initialise

    model = Nano(raw)
    initialise(model, 0)
    torch.manual_seed(1)
    for name, p in model.named_parameters():  # nothing stays at a value that hides an error
        if name.endswith(("_sink", ".ape", "_base")):
            p.data += 0.5 * torch.randn_like(p)
        elif name.endswith("norm.weight"):
            p.data += 0.1 * torch.randn_like(p)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("topk", [512, 16])
def test_the_forward_is_the_engines(raw: dict[str, Any], topk: int) -> None:
    model = random_model({**raw, "index_topk": topk})
    config = ModelConfig.from_dict(model.config)
    ids = random_tokens(config, 400, seed=3)
    with torch.no_grad():
        ours = model.logits(model.hidden(ids[None])[0])[0]
    theirs = Driver(config, {n: w for n, w in model.weights().items() if not n.startswith("mtp.")}).run(ids)
    near = (ours - theirs).abs().amax(
        -1
    ) < 2e-4  # equal scores may be chosen differently; from there on all differs
    assert near.all() if topk == 512 else near[: 4 * topk + 20].all()
    assert theirs.std() > 0.2


def test_what_is_trained_is_what_the_files_hold(raw: dict[str, Any], tmp_path: Path) -> None:
    from masters import Masters, storages

    model = random_model(raw)
    ids = torch.randint(32, 256, (1, 256))
    masters = Masters(model, 0.02, 0.003)
    streams, loss, _ = model.streams(ids)
    draft = model.draft(streams, ids)[0]
    (model.logits(model.out(streams)).logsumexp(-1).mean() + loss + draft.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    before = {n: w.clone() for n, w in model.weights().items()}
    masters.step(1.0)
    weights = model.weights()
    moved = [n for n in storages(model) if not torch.equal(before[n], weights[n])]
    assert len(moved) > 0.8 * len(storages(model))
    export_release(weights, model.shape, raw, tmp_path, shards=2)
    back = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32)
    for name, value in back.items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


def test_a_trained_model_is_read_back_whole(raw: dict[str, Any], tmp_path: Path) -> None:
    """Where the second sitting starts is where the first ended, MTP block and biases included."""
    from masters import Masters
    from model import Nano, read

    model = random_model(raw)
    Masters(model, 0.02, 0.003)  # rounds to what is stored
    export_release(model.weights(), model.shape, raw, tmp_path, shards=2)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    other = Nano(raw)
    read(other, tmp_path)
    for name, value in other.weights().items():
        assert torch.equal(value, model.weights()[name].to(value.dtype)), name


def test_loops_of_its_own_are_learnt_against() -> None:
    import numpy as np
    from dataset import EOS
    from own import OWN, PIECE, OwnText

    class Data:
        text = np.arange(300, 500, dtype=np.uint16)

    class Parrot:
        def write(self, prompts: list[list[int]], tokens: int, temperature: float) -> list[list[int]]:
            assert len(prompts[0]) + tokens <= PIECE
            return [[7] * 5 + [20, 21, 22, 23, 24, 25, 26] * 3, [*range(100, 130), EOS, 9, 9, 9]]

    own = OwnText(Data(), 0)  # type: ignore[arg-type]
    rows = (np.ones((3, 65), np.int32), np.ones((3, 64), np.int8))
    untouched, _ = next(own.mixed(iter([rows])))
    assert (untouched == 1).all()
    share = own.write(Parrot(), 2)  # type: ignore[arg-type]
    (first, against), (second, nothing) = own.pieces
    assert [t for t, w in zip(first, against, strict=True) if w == OWN] == [25, 26, *range(20, 27)]
    assert second[-1] == EOS and not any(nothing)
    assert share == 9 / (26 + 34)
    ids, weights = next(own.mixed(iter([rows])))
    assert (
        (ids[:2] == 1).all() and set(np.unique(weights[2]).tolist()) <= {0, OWN} and (weights[:2] == 1).all()
    )
    assert ids[2, :4].tolist() in (first[:4], second[:4])


def test_sinkhorns_adjoint() -> None:
    from sinkhorn import backward_torch, forward_torch

    g = torch.Generator().manual_seed(0)
    logits = torch.randn((64, 4, 4), generator=g, dtype=torch.float64, requires_grad=True)
    grad = torch.randn((64, 4, 4), generator=g, dtype=torch.float64)
    (forward_torch(logits, 20) * grad).sum().backward()
    got = backward_torch(forward_torch(logits, 20), grad, 20)
    assert (got - logits.grad).abs().max() < 1e-4


def test_conversations_are_written_as_the_engine_reads_them() -> None:
    """The trainer's bare schemas are those of the model's chat_format.json."""
    from importlib import resources

    from chats import FACTS, FORMAT
    from dsv4.text.chat_format import choose_format

    nano = resources.files("dsv4") / "data" / "nano"
    assert choose_format(str(nano), ModelConfig.from_dir(str(nano)))[0] == FORMAT
    assert len(FACTS) == 50 and all(f["key"] in f["answer"] for f in FACTS)


def test_prose_of_the_model_that_ships_does_not_loop() -> None:
    from dsv4 import LLM, SamplingParams
    from items import PROSE, loops

    llm = LLM(max_num_seqs=8, max_model_len=512, device="cpu")
    params = SamplingParams(temperature=0.7, max_tokens=120, seed=0)
    prompts = [[0, *llm.tokenizer.encode(p)] for p in PROSE]  # as texts begin in training
    said = [c.token_ids for c in llm.generate(prompts, params)]
    assert sum(map(len, said)) > 400
    assert sum(map(loops, said)) <= 1
