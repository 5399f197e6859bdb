"""Layers that share a history, and a third ratio: data alone, counted by layout, planner and step model."""

from __future__ import annotations

import pytest
from dsv4._core import LayoutSpec
from dsv4.errors import ConfigError
from dsv4.gpus import gpu
from dsv4.model.config import ModelConfig
from dsv4.model.layout import block_size, layers_of
from dsv4.model.names import tensors
from dsv4.simulate.device import Shares, step_coefficients

from tests.support.models import random_config

CONFIG = random_config(
    compress_ratios=[4, 16, 4, 0, 16, 4],
    compress_rates={"compressed_sparse_attention": [4, 16]},
    history_layers=[0, 1, 0, 3, 1, 5],
)
LAYOUT = CONFIG.layout("bfloat16", "bfloat16")  # rows and keys of 64 channels: 128 bytes


def test_history_is_counted_once_for_whoever_reads_it() -> None:
    parts = {c.name: c.layers for c in LAYOUT.components}
    assert parts["csa"] == parts["csa_index"] == parts["csa_pool"] == (0, 5)
    assert parts["csa_16"] == parts["csa_16_index_pool"] == (1,) and parts["window"] == tuple(range(6))
    assert LAYOUT.history_bytes_per_token == 2 * (128 + 128) / 4 + (128 + 128) / 16
    assert LAYOUT.replay_tokens == 6 * 127 and LAYOUT.block_tokens == 256


def test_a_layer_that_reads_anothers_history_has_queries_and_no_compressor() -> None:
    names = {name for name, _ in tensors(CONFIG)}
    for layer, stores in enumerate((True, True, False, False, False, True)):
        assert (f"layers.{layer}.attn.compressor.ape" in names) == stores
        assert (f"layers.{layer}.attn.indexer.compressor.ape" in names) == stores
        assert (f"layers.{layer}.attn.indexer.wq_b.weight" in names) == (layer != 3)


def test_a_step_scans_a_history_for_each_layer_that_reads_it() -> None:
    card = gpu("h100")
    c = step_coefficients(CONFIG, LAYOUT, card, 1, Shares(1, 1, 1, 1, 1, 1))
    per_us = card.copy_bytes_per_s / 1e6
    assert c["context_read_us"] * per_us == pytest.approx(128 * (3 / 4 + 2 / 16))
    assert c["entry_read_us"] * per_us == pytest.approx(5 * 128)
    assert c["indexed"] == [{"ratio": 4, "share": 0.6}, {"ratio": 16, "share": 0.4}]


def test_a_component_that_the_step_model_does_not_know_is_refused() -> None:
    data = LAYOUT.data()
    data["components"][0]["name"] = "csb"
    with pytest.raises(ConfigError, match="does not know component 'csb'"):
        step_coefficients(CONFIG, LayoutSpec(data), gpu("h100"), 1)


def test_a_reach_covers_the_block_before_where_entries_overlap() -> None:
    reaches = [spec.reach for spec in layers_of([4, 256, 0], 128, csa=(4, 256), hca=(128,))]
    assert reaches == [127, 256, 127]


def test_the_block_is_the_least_that_all_ratios_and_ranks_divide() -> None:
    layers = ModelConfig.preset("v4-flash").layers
    assert [block_size(layers, ranks=r) for r in (1, 2, 4, 8)] == [256, 256, 512, 1024]
    assert block_size(layers_of([4, 24], 128, csa=(4,), hca=(24,))) == 264
    with pytest.raises(ConfigError, match="block_size is 300; it must be a multiple of 128, the next is 384"):
        block_size(layers, 300)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"history_layers": [0, 1, 1, 3, 1, 5]},
            "history_layers has 1 for layer 2; it takes 2, or an earlier",
        ),
        ({"history_layers": [0, 1, 5, 3, 1, 5]}, "history_layers has 5 for layer 2"),
        ({"history_layers": [0, 1]}, "history_layers has 2 entries"),
        ({"compress_rates": {"compressed_sparse_attention": []}}, "one or more whole numbers"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        random_config(
            **{
                "compress_ratios": [4, 16, 4, 0, 16, 4],
                "compress_rates": {"compressed_sparse_attention": [4, 16]},
                **change,
            }
        )
