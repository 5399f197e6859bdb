"""Milliseconds of a decode step on a GPU, launched kernel by kernel and as a CUDA graph: `python -m benches.decode_step`.

The model that ships, and a random one of Flash's widths with 4 layers and 128 experts. No prompt is computed: the cache holds
random rows. A step is what the engine does between two plans: index tables, layers, head, and the best token of each row back
on the host. Both ways take turns in one process; `replay` is the graph alone, by the device's clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable
from importlib import resources
from statistics import median

import numpy as np
import torch
from dsv4.backends import choose
from dsv4.cache.paged import PagedCache
from dsv4.cache.rows import Rows
from dsv4.engine.graphs import Capture, DecodeGraphs, Recorder
from dsv4.engine.sampler import Sampler
from dsv4.model.batch import Batch, Row
from dsv4.model.config import ModelConfig
from dsv4.model.layout import layers_of
from dsv4.model.survey import without_files
from dsv4.model.v4 import V4Model
from dsv4.model.weights import load_weights
from torch import Tensor

NANO = str(resources.files("dsv4") / "data" / "nano")
Hidden = Callable[[np.ndarray, np.ndarray, np.ndarray], Tensor]
"""Token ids, positions and slabs [R] -> streams [R, n, d]."""


def flash(layers: int = 4, experts: int = 128) -> ModelConfig:
    """Flash's widths; CSA and HCA layers in turn, the first routed by token ids."""
    return dataclasses.replace(
        ModelConfig.preset("v4-flash"),
        num_layers=layers,
        layers=layers_of((4, 128) * (layers // 2), 128),
        num_experts=experts,
        num_hash_layers=1,
        vocab_size=8192,
    )


class Decoder:
    """A model over a cache of random state for `rows` requests, a slab and `max_len` tokens of pages each."""

    def __init__(self, name: str, rows: int, max_len: int, device: str = "cuda") -> None:
        torch.manual_seed(0)
        config = ModelConfig.from_dir(NANO) if name == "nano" else flash()
        dtype = torch.bfloat16
        found = None if name == "nano" else without_files(config, seed=0)
        weights = load_weights(NANO, config, dtype, packed=True, device=device, found=found)
        layout = config.layout("fp8_ds_mla", "mxfp4")
        blocks = -(-max_len // layout.block_tokens)
        self.config, self.rows = config, rows
        self.cache = PagedCache(layout, (rows + 1) * blocks, rows + 1, device)
        self.model = V4Model(config, weights, self.cache, choose("auto", device), consume=True)
        self.host_pages = torch.randperm((rows + 1) * blocks).int().view(rows + 1, blocks)
        self.pages = self.host_pages.to(device)
        self._fill()

    def _fill(self) -> None:
        for i, layer in enumerate(self.model.layers):
            attn, spec = layer.attn, self.config.layers[i]
            self._write(attn.window)
            if attn.history is not None:
                self._write(attn.history)
                self.cache.pools(spec.pool, i).normal_()
            if attn.indexer is not None:
                self._write(attn.indexer.keys)
                self.cache.pools(spec.index_pool, i).normal_()

    def _write(self, rows: Rows) -> None:
        for ids in torch.arange(len(rows.region) * rows.rows, device=self.pages.device).split(1 << 15):
            rows.write(ids, torch.randn((len(ids), rows.codec.dim), device=ids.device))

    def graphs(self, capture: Capture) -> DecodeGraphs:
        newest = torch.zeros(len(self.pages) + 64, dtype=torch.int64, device=self.pages.device)
        sampler = Sampler(self.model.ops, len(self.pages), self.model.config.vocab_size, self.pages.device)
        return DecodeGraphs(self.model, self.pages, newest, sampler, capture)

    def eager(self, token_ids: np.ndarray, positions: np.ndarray, slabs: np.ndarray) -> Tensor:
        """As the engine's runner without graphs."""
        pairs = zip(slabs.tolist(), positions.tolist(), strict=True)
        return self.model.hidden(
            Batch(
                token_ids=torch.from_numpy(token_ids.astype(np.int64)),
                positions=torch.from_numpy(positions.astype(np.int64)),
                rows=tuple(Row(s, p, 1, i) for i, (s, p) in enumerate(pairs)),
                page_table=self.host_pages,
                logit_index=torch.arange(len(slabs)),
                device_pages=self.pages,
            )
        )

    def steps_ms(self, hidden: Hidden, batch: int, context: int, steps: int) -> float:
        """Median wall time of a step of `batch` rows with up to `context` tokens each."""
        slabs = np.arange(batch)
        positions = context - 1 - steps - 7 * slabs
        tokens, times = np.full(batch, 5), []
        for _ in range(steps):
            begun = time.perf_counter()
            logits = self.model.logits(hidden(tokens, positions, slabs))
            tokens = np.array(logits.argmax(-1).tolist())
            times.append(1e3 * (time.perf_counter() - begun))
            positions = positions + 1
        return median(times)


def replay_ms(graphs: DecodeGraphs, steps: int) -> float:
    """Of the graph captured last, by events on the device."""
    replay, times = list(graphs._replays.values())[-1], []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.decode_step", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=("nano", "flash"), default=["nano", "flash"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", flush=True)
    for name in args.models:
        begun = time.perf_counter()
        decoder = Decoder(name, max(args.batches), max(args.contexts))
        layers = decoder.config.num_layers
        print(f"{name}: {layers} layers, made in {time.perf_counter() - begun:.1f} s", flush=True)
        graphs = decoder.graphs(Recorder())
        for context in args.contexts:
            for batch in args.batches:
                for hidden in (decoder.eager, graphs.hidden):  # compiles, captures
                    decoder.steps_ms(hidden, batch, context, 2)
                eager, graph = (
                    decoder.steps_ms(hidden, batch, context, args.steps)
                    for hidden in (decoder.eager, graphs.hidden)
                )
                alone = replay_ms(graphs, args.steps)
                print(
                    f"  {batch:3} rows, {context:,} tokens: eager {eager:7.3f} ms, graph {graph:7.3f} ms "
                    f"({eager / graph:.2f} times as fast), replay {alone:7.3f} ms ({alone / layers:.4f} a layer)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
