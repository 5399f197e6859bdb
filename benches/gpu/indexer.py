"""The lightning indexer of Flash and Pro (64 heads of 128, FP8 and FP4 keys) and its top-k.

`indexer`: all scores written, as DeepGEMM's paged kernel does. `topk`: the whole choice of 512 or 1,024 entries, its
"peer" the scan alone: the difference is what the choice costs. In decode its thresholds are those of a query a tenth
away from the present one, as the step before would leave them. Bytes are those of the keys and of what is handed back:
every score, or the chosen entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from dsv4.formats import row_format
from dsv4.kernels.device import capability
from dsv4.kernels.triton import indexer, topk
from torch import Tensor

from benches.gpu.peers import deep_gemm
from benches.gpu.timing import Bench, Row

HEADS, DIM, PER_PAGE = 64, 128, 64
CONTEXTS = (4096, 32_768, 131_072, 1_048_576)
BATCHES = (1, 8, 32, 128)
FORMATS = {"fp8": 132, "mxfp4": 68}


def scan_of(form: str) -> Any:
    """The scan that runs on this device, and the name of its backend."""
    if form == "mxfp4" and capability()[0] == 9:
        from dsv4.kernels.gluon.indexer import launch_scan

        return launch_scan
    return indexer.launch_scan


class Keys:
    """Index rows in pages, as the cache holds them."""

    def __init__(self, form: str, region: Tensor) -> None:
        self.codec, self.region, self.rows = row_format(form, DIM, 64), region, PER_PAGE

    def read(self, ids: Tensor) -> Tensor:
        """float32 [N, 128]."""
        return self.codec.read(self.region, ids // self.rows, ids % self.rows, self.rows)


class Case:
    """Random keys in scattered pages and prepared queries, one a request."""

    def __init__(self, form: str, batch: int, entries: int, device: torch.device) -> None:
        blocks = entries // PER_PAGE
        region = torch.randint(
            0, 120, (batch * blocks, PER_PAGE * FORMATS[form]), dtype=torch.uint8, device=device
        )
        if form == "mxfp4":
            region[:, PER_PAGE * 64 :] = region[:, PER_PAGE * 64 :] % 4 + 120
        else:
            region[:, PER_PAGE * DIM :] = torch.ones((1, PER_PAGE), device=device).view(torch.uint8)
        self.keys = Keys(form, region)
        self.pages = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
        self.slab = torch.arange(batch, dtype=torch.int32, device=device)
        self.visible = torch.full((batch,), entries, dtype=torch.int32, device=device)
        self.q = torch.randn((batch, HEADS, DIM), device=device)
        self.weights = torch.randn((batch, HEADS), device=device)
        self.entries, self.batch, self.form = entries, batch, form
        self.none = torch.empty((0,), dtype=torch.int32, device=device)
        self.out = torch.empty((batch, 1024), dtype=torch.int32, device=device)

    def part(self, q: Tensor) -> tuple:
        return (
            q.to(torch.float8_e4m3fn),
            self.weights,
            self.keys,
            self.pages,
            self.slab,
            self.visible,
            self.entries,
        )

    def scores(self) -> Any:
        """A function that writes all scores, and the scores."""
        plan = indexer.plan_of(HEADS, self.keys, 512, self.entries, 1)
        scores = torch.empty((self.batch, self.entries), dtype=torch.float32, device=self.q.device)
        nothing = dict(bound=self.none, used=self.none, key=self.none, index=self.none)
        f = partial(scan_of(self.form), plan, *self.part(self.q), append=False, scores=scores, **nothing)
        return f, scores

    def choice(self, k: int) -> Any:
        """A function that chooses k entries of each request."""
        plan, scan, out = (
            indexer.plan_of(HEADS, self.keys, k, self.entries, 1),
            scan_of(self.form),
            self.out[:, :k],
        )
        if not plan.append:
            return partial(indexer.whole, plan, scan, self.part(self.q), out)
        return partial(indexer.appended, plan, scan, self.part(self.q), out)

    def error(self, scores: Tensor) -> float:
        """Largest error of the first thousand scores of the last request, over the largest score."""
        n = min(1000, self.entries)
        ids = self.pages[-1, : -(-n // PER_PAGE)].long()[:, None] * PER_PAGE
        ids = (ids + torch.arange(PER_PAGE, device=ids.device)).flatten()[:n]
        q, w = self.q[-1].to(torch.float8_e4m3fn).double(), 2 * self.weights[-1].double()
        expected = (torch.relu(self.keys.read(ids).double() @ q.T) * w).sum(1)
        return float((scores[-1, :n].double() - expected).abs().max() / expected.abs().max())

    def peer(self, bench: Bench) -> float | None:
        """DeepGEMM's FP8 time for as many keys."""
        package = deep_gemm()
        if package is None:
            return None
        keys = self if self.form == "fp8" else Case("fp8", self.batch, self.entries, self.q.device)
        kv = keys.keys.region.view(-1, PER_PAGE, 1, DIM + 4)
        lens = self.visible[:, None]
        plan = package.get_paged_mqa_logits_metadata(lens, PER_PAGE, package.get_num_sms())
        q = self.q.to(torch.float8_e4m3fn)[:, None]
        return bench.us(
            lambda: package.fp8_paged_mqa_logits(
                q, kv, self.weights, lens, keys.pages, plan, self.entries, False
            )
        )


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    peers: dict[tuple[int, int], float | None] = {}
    for form, size in FORMATS.items():
        for context in CONTEXTS:
            for batch in (1, 8) if bench.quick else BATCHES:
                yield from _rows(bench, form, size, batch, context, peers)
                bench.free()
    yield from _choices(bench)
    yield from _prompts(bench)


def _rows(bench: Bench, form: str, size: int, batch: int, context: int, peers: dict) -> Iterator[Row]:
    entries = context // 4
    case = Case(form, batch, entries, bench.device)
    if (batch, entries) not in peers:
        peers[batch, entries] = case.peer(bench)
    f, scores = case.scores()
    f()
    scan = bench.us(f)
    keys, flops = batch * entries * size, 2 * batch * entries * HEADS * DIM
    shape = f"{form}, {HEADS} heads"
    yield Row(
        "indexer",
        shape,
        batch,
        context,
        scan,
        keys + 4 * batch * entries,
        flops,
        "fp8",
        "DeepGEMM fp8",
        peers[batch, entries],
        case.error(scores),
    )
    del f, scores
    for k in (512, 1024):
        if entries > k:
            us = bench.us(case.choice(k))
            yield Row(
                "topk",
                f"{form} scan and top {k}",
                batch,
                context,
                us,
                keys + 4 * batch * k,
                flops,
                "fp8",
                "scan alone",
                scan,
            )


def _choices(bench: Bench) -> Iterator[Row]:
    """The choice alone among written scores, against torch.topk."""
    for batch in (1, 8, 32, 128):
        scores = torch.randn((batch, 8192), device=bench.device)
        visible = torch.full((batch,), 8192, dtype=torch.int32, device=bench.device)
        for k in (512, 1024):
            out = torch.empty((batch, k), dtype=torch.int32, device=bench.device)
            us = bench.us(partial(topk.choose, scores, visible, out, 8192))
            expected = scores.topk(k).indices.sort().values
            peer = bench.us(partial(torch.topk, scores, k))
            yield Row(
                "topk",
                f"written scores, top {k}",
                batch,
                32_768,
                us,
                4 * scores.numel(),
                0,
                "bf16",
                "torch.topk",
                peer,
                float((out != expected).sum()),
            )


def _prompts(bench: Bench) -> Iterator[Row]:
    """256 tokens of a prompt at the end of a long context, all of the choice."""
    for form, size in FORMATS.items():
        for context in (32_768, 1_048_576):
            entries = context // 4
            case = Case(form, 1, entries, bench.device)
            plan = indexer.plan_of(HEADS, case.keys, 512, entries, 4 if form == "mxfp4" else 2)
            q = torch.randn((256, HEADS, DIM), device=bench.device).to(torch.float8_e4m3fn)
            part = (
                q,
                torch.randn((256, HEADS), device=bench.device),
                case.keys,
                case.pages,
                torch.zeros(256, dtype=torch.int32, device=bench.device),
                torch.full((256,), entries, dtype=torch.int32, device=bench.device),
                entries,
            )
            out = torch.empty((256, 512), dtype=torch.int32, device=bench.device)
            run = indexer.appended if plan.append else indexer.whole
            us = bench.us(partial(run, plan, scan_of(form), part, out))
            flops = 2 * 256 * entries * HEADS * DIM
            yield Row(
                "indexer", f"{form} prompt, scan and top 512", 256, context, us, entries * size, flops, "fp8"
            )
            bench.free()
