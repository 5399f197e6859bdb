"""Trains the small model, exports it in the release format and measures it, all within a time.

    python3 train.py --data DATA --out OUT --seconds 660 --seed 0 [--resume] [--smoke]
    python3 train.py --data DATA --out OUT2 --seconds 400 --seed 0 --start OUT

DATA is what build_data.py made. OUT gets model-0000*-of-00002.safetensors, config.json, tokenizer.json,
chat_format.json, report.json and log.jsonl; the work files (checkpoint, compiler cache) lie in WORK (default OUT/work).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="checkpoint and compiler cache (default: OUT/work)")
    parser.add_argument("--seconds", type=float, default=660, help="from start to end, evaluation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a trained model, whose own loops are then unlearnt")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in WORK")
    parser.add_argument(
        "--smoke", action="store_true", help="the whole path in a minute on a CPU, learning nothing"
    )
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--warm", help=argparse.SUPPRESS)  # one part of the model to compile into the cache
    args = parser.parse_args()
    args.work = args.work or args.out / "work"
    args.work.mkdir(parents=True, exist_ok=True)
    return args


ARGS = arguments()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ARGS.work / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(ARGS.work / "triton"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from config import CONFIG, Run  # noqa: E402
from dataset import PAD, Dataset  # noqa: E402
from dsv4.model.export import export_release  # noqa: E402
from health import Health  # noqa: E402
from masters import Masters  # noqa: E402
from measure import Measure  # noqa: E402
from model import Nano, initialise, read  # noqa: E402
from own import OWN, OwnText  # noqa: E402
from rows import ANSWER, AVOID, COPY, TEXT, Mix, batches  # noqa: E402
from torch import Tensor  # noqa: E402

PARTS = ("0", "2", "3", "head", "draft")
"""What is compiled: a layer of each kind, the head with its loss, the MTP block."""


class Trainer:
    """The model, its optimizer and the clock of a run."""

    def __init__(self, run: Run, seed: int, device: str, compiled: bool) -> None:
        self.run, self.seed, self.device = run, seed, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = Nano(CONFIG, dtype)
        initialise(self.model, seed)
        if ARGS.start:
            read(self.model, ARGS.start)
        self.model.to(device)
        self.masters = Masters(self.model, run.muon_rate, run.adam_rate)
        self.dense = torch.ones((), dtype=torch.bool, device=device)
        self.gaps = torch.Generator().manual_seed(seed)
        self.steps, self.tokens, self.progress, self.caution = 0, 0, 0.0, 1.0
        self.head_loss: Any = self._head_loss
        if compiled:
            torch._dynamo.config.recompile_limit = 32
            for layer in self.model.layers:
                layer.compile(dynamic=False)
            self.head_loss = torch.compile(self._head_loss, dynamic=False)
            self.model.mtp[0].block = torch.compile(self.model.mtp[0].block, dynamic=False)

    @contextmanager
    def uncompiled(self) -> Iterator[Nano]:
        """The model for other shapes; afterwards it is as it was."""
        compiled = [layer._compiled_call_impl for layer in self.model.layers]
        block = self.model.mtp[0].__dict__.pop("block", None)
        for layer in self.model.layers:
            layer._compiled_call_impl = None
        try:
            yield self.model
        finally:
            for layer, call in zip(self.model.layers, compiled, strict=True):
                layer._compiled_call_impl = call
            if block is not None:
                self.model.mtp[0].block = block

    def _head_loss(self, streams: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(self.model.out(streams)).flatten(0, 1)
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
        # against a token: -log(1 - p), of which no logit's gradient is above 1
        against = -torch.log(-torch.expm1(-nats.clamp(min=1e-4)))
        each = torch.where(weights < 0, against, nats)
        return (each * weights.abs()).sum() / weights.abs().sum(), each.detach()

    def step(self, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """One update. ids int64 [B, T + 1], weights float32 [B, T]."""
        run, model = self.run, self.model
        self.dense.fill_(self.progress < run.dense)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        streams, index_loss, loads = model.streams(inputs, dense=self.dense, gaps=self._gaps(inputs.shape[1]))
        loss, each = self.head_loss(streams, targets, weights)
        draft_loss, load = self._draft_loss(streams[: run.draft_rows], targets[: run.draft_rows], weights)
        (loss + index_loss + draft_loss).backward()
        rate = self.rate()
        self.masters.step(rate)
        model.zero_grad(set_to_none=True)
        for block, share in zip((*model.layers, *model.mtp), (*loads, load), strict=True):
            if not block.ffn.hashed:
                block.ffn.gate.bias.add_((share.mean() - share).sign(), alpha=run.bias_rate * min(1.0, rate))
        self.steps += 1
        self.tokens += targets.numel()
        return {
            "loss": loss.detach(),
            "index": index_loss.detach(),
            "draft": draft_loss.detach(),
            "each": each,
        }

    def _draft_loss(self, streams: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        hidden, load = self.model.draft(streams, targets)
        after = F.pad(targets[:, 1:], (0, 1), value=PAD)
        weights = F.pad(weights[: len(targets), 1:].clamp(min=0), (0, 1))
        logits = F.linear(hidden, self.model.head.weight.detach().to(hidden.dtype)).float()
        each = F.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="none").view(after.shape)
        return (each * weights).sum() / weights.sum().clamp(min=1), load

    def _gaps(self, tokens: int) -> Tensor:
        """What is added to positions, int64 [T]: zeros, or late in training one or two jumps between chunks, so
        that distances up to `farthest` are seen in short rows."""
        gaps = torch.zeros(tokens, dtype=torch.int64)
        draw = torch.rand(5, generator=self.gaps).tolist()
        if self.progress >= self.run.far_from and draw[0] < 0.5:
            room = (self.run.farthest - tokens) // 128
            for where, much in ((draw[1], draw[2]), (draw[3], draw[4]))[: 1 + (draw[0] < 0.25)]:
                gaps[int(where * tokens / 128) * 128 :] += int(much * room / 2) * 128
        return gaps.to(self.device, non_blocking=True)

    def rate(self) -> float:
        run = self.run
        falling = min(1.0, max(run.lowest, (1 - self.progress) / (1 - run.flat)))
        return min(1.0, (self.steps + 1) / run.warm_up_steps) * falling * self.caution

    def save(self, file: Path) -> None:
        """A checkpoint, whole or not at all."""
        biases = {n: b for n, b in self.model.named_buffers()}
        state = {"masters": self.masters.state(), "buffers": biases, "gaps": self.gaps.get_state()}
        state |= {k: getattr(self, k) for k in ("steps", "tokens", "progress", "caution", "seed")}
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)

    def restore(self, file: Path) -> None:
        state = torch.load(file, map_location=self.device)
        if state["seed"] != self.seed:
            raise SystemExit(f"{file} is of seed {state['seed']}, not {self.seed}")
        self.masters.restore(state["masters"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.gaps.set_state(state["gaps"].cpu())
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.progress, self.caution = state["progress"], state["caution"]


class Log:
    """Lines on the terminal and in log.jsonl."""

    def __init__(self, file: Path, began: float, append: bool) -> None:
        self.file, self.began = file.open("a" if append else "w"), began

    def __call__(self, show: bool = True, **values: Any) -> None:
        line = {"seconds": round(time.time() - self.began, 1), **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if show:
            print(
                " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()),
                flush=True,
            )


def train(
    trainer: Trainer, stream: Any, until: float, log: Log, checkpoint: Path, pause: Callable[[], None]
) -> None:
    """Steps until the clock says so, `pause` after each. A loss that has gone far up goes back to the checkpoint at
    half the rate."""
    run, began, first, health = trainer.run, time.time(), trainer.progress, Health()
    total, saved, tokens = max(1e-9, until - began), time.time(), trainer.tokens
    losses: list[Tensor] = []
    while (now := time.time()) < until:
        trainer.progress = first + (1 - first) * (now - began) / total
        ids, weights = next(stream)
        on_device = torch.from_numpy(weights).to(trainer.device).float()
        out = trainer.step(torch.from_numpy(ids).to(trainer.device).long(), on_device)
        losses.append(out["loss"])
        if trainer.steps == 1:
            log(event="first step", loss=float(out["loss"]))
        if trainer.steps % 20 == 0:
            speed = (trainer.tokens - tokens) / (time.time() - began)
            health.take(report(trainer, torch.stack(losses), out, on_device, speed, log))
            losses.clear()
            if health.lost and checkpoint.exists():
                go_back(trainer, checkpoint)
                health.forget()
                log(event="back to a checkpoint at half the rate", step=trainer.steps)
            elif now - saved > run.checkpoint_seconds and health.good:
                trainer.save(checkpoint)
                saved = now
        pause()
    trainer.save(checkpoint)


class Pauses:
    """What training stops for: a look at the prose half way, and text of the model's own to learn from."""

    def __init__(self, trainer: Trainer, measure: Measure, own: OwnText, log: Log) -> None:
        self.trainer, self.measure, self.own, self.log = trainer, measure, own, log
        self.looked, self.wrote = trainer.progress, 0.0

    def __call__(self) -> None:
        progress, run, now = self.trainer.progress, self.trainer.run, time.time()
        with self.trainer.uncompiled():
            if progress > 0.5 > self.looked:
                self.log(event="half way", **self.measure.glance())
            if run.own and now - self.wrote > run.own_seconds:
                self.log(event="own text", loops=self.own.write(self.measure, run.own))
                self.wrote = time.time()
        self.looked = progress


def go_back(trainer: Trainer, checkpoint: Path) -> None:
    """Weights as they were, the clock as it is."""
    caution, progress = trainer.caution / 2, trainer.progress
    trainer.restore(checkpoint)
    trainer.caution, trainer.progress = caution, progress


def report(
    trainer: Trainer, losses: Tensor, out: dict[str, Tensor], weights: Tensor, speed: float, log: Log
) -> float:
    """A line of the log; the mean of the steps' losses. What it is made of is the last step's."""
    kinds = (("text", TEXT), ("copy", COPY), ("answer", ANSWER), ("loop", AVOID), ("own", OWN))
    loss, each = float(losses.mean()), out["each"]
    parts = {k: float(each[weights == w].mean()) for k, w in kinds if bool((weights == w).any())}
    log(
        trainer.steps % 200 == 0 or trainer.steps in (20, 60, 100),
        step=trainer.steps,
        tokens=f"{trainer.tokens / 1e6:.1f}M",
        speed=f"{speed / 1e3:.0f}K/s",
        loss=loss,
        rate=round(trainer.rate(), 3),
        **parts,
        **{k: round(float(out[k]), 4) for k in ("index", "draft")},
    )
    return loss


def export(trainer: Trainer, data: Path, out: Path) -> int:
    """Writes the model directory; its bytes."""
    weights = {n: w.cpu() for n, w in trainer.model.weights().items()}
    export_release(weights, trainer.model.shape, CONFIG, out, shards=2)
    shutil.copy(data / "tokenizer.json", out)
    (out / "chat_format.json").write_text(
        '{"tools_before": "## Tools\\n\\n", "tools_after": "", "whole_schema": true}\n'
    )
    files = [
        *out.glob("*.safetensors"),
        out / "config.json",
        out / "tokenizer.json",
        out / "chat_format.json",
    ]
    return sum(f.stat().st_size for f in files)


def warm(part: str, run: Run, device: str) -> None:
    """Compiles one part and runs it once in each direction, so that the cache has it."""
    trainer = Trainer(run, 0, device, compiled=True)
    model, tokens = trainer.model, run.length
    ids = torch.zeros((run.rows, tokens), dtype=torch.int64, device=device)
    shape = (run.rows, tokens, 4, CONFIG["hidden_size"])
    streams = torch.randn(shape, device=device, dtype=model.dtype, requires_grad=True)
    if part == "head":
        trainer.head_loss(streams, ids, torch.ones(ids.shape, device=device))[0].backward()
    elif part == "draft":
        model.draft(streams[: run.draft_rows], ids[: run.draft_rows])[0].float().sum().backward()
    else:
        layer = model.layers[int(part)]
        rope = model.ropes(tokens, device, torch.zeros(tokens, dtype=torch.int64, device=device))
        x, loss, _ = layer(streams, ids, rope[bool(layer.attn.ratio)], trainer.dense, model.topk)
        (x.float().sum() + loss).backward()


def start_warming(compiled: bool) -> list[subprocess.Popen]:
    """One process for each part: the compiler is what takes long, and it uses one core."""
    if not compiled:
        return []
    with (ARGS.work / "warm.log").open("w") as log:
        command = [sys.executable, *sys.argv]
        return [subprocess.Popen([*command, "--warm", p], stdout=log, stderr=log) for p in PARTS]


def main() -> None:
    began = time.time()
    device = "cuda" if torch.cuda.is_available() and not ARGS.smoke else "cpu"
    run = Run.smoke() if ARGS.smoke else Run.second() if ARGS.start else Run()
    run.rows = ARGS.rows or run.rows
    run.own = 2 if ARGS.smoke and ARGS.start else run.own
    torch.backends.cuda.matmul.allow_tf32 = True
    if ARGS.warm:
        warm(ARGS.warm, run, device)
        return
    log = Log(ARGS.out / "log.jsonl", began, ARGS.resume)
    compiled = not ARGS.eager and not ARGS.smoke
    warming = start_warming(compiled)
    data = Dataset.load(ARGS.data)
    log(event="data", text=len(data.text), chats=len(data.chats))
    stream = batches(
        data, run.rows, run.length, ARGS.seed + 100 * int(began) * ARGS.resume, Mix(), run.workers
    )
    next(stream)  # starts the workers, before CUDA does
    trainer = Trainer(run, ARGS.seed, device, compiled)
    for process in warming:
        try:
            process.wait(max(1.0, began + 150 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    log(event="compiled", codes=str([p.returncode for p in warming]))
    checkpoint = ARGS.work / "checkpoint.pt"
    if ARGS.resume and checkpoint.exists():
        trainer.restore(checkpoint)
        log(event="resumed", step=trainer.steps)
    end = began + ARGS.seconds

    early = Measure(trainer.model, data, ARGS.work / "early.json", end, 0.02 if ARGS.smoke else 0.5)
    own = OwnText(data, ARGS.seed)
    pauses = Pauses(trainer, early, own, log)
    train(trainer, own.mixed(stream), end - run.evaluation_seconds, log, checkpoint, pauses)
    log(event="trained", step=trainer.steps, tokens=trainer.tokens)
    log(event="exported", bytes=export(trainer, ARGS.data, ARGS.out))
    if device == "cuda":
        torch.cuda.empty_cache()
    lengths, end = ({"lengths": (512,)}, math.inf) if ARGS.smoke else ({}, end)
    with trainer.uncompiled() as model:
        measure = Measure(model, data, ARGS.out / "report.json", end, 0.05 if ARGS.smoke else 1.0)
        report = measure.all(**lengths)
    log(event="done")
    print(f"\nseed {ARGS.seed}, {trainer.steps} steps, {trainer.tokens / 1e6:.0f}M tokens")
    for name, value in report.items():
        if name not in ("samples", "seconds"):
            shown = (
                {k: v for k, v in value.items() if k not in ("texts", "wrong")}
                if isinstance(value, dict)
                else value
            )
            print(f"  {name:26} {shown}")
    sys.stdout.flush()
    os._exit(0)  # the workers see it and end


if __name__ == "__main__":
    main()
