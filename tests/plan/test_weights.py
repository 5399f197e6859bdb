"""Weights of a plan: published totals, nothing lost or counted twice when they are cut, and what the engine loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from dsv4.errors import ConfigError
from dsv4.model.config import RELEASED, ModelConfig
from dsv4.model.parallel import Parallel, alternatives, choose
from dsv4.plan.weights import EXPERTS, PUBLISHED, Kind, Weights, find_weights, weight_rows

from tests.model.test_config import RELEASES
from tests.support.checkpoints import write_release


@pytest.mark.parametrize("name", RELEASED)
def test_totals_are_the_published_ones(name: str) -> None:
    rows = weight_rows(Weights.released(ModelConfig.preset(name), draft=True), Parallel(), held="released")
    assert sum(r.total for r in rows) == sum(r.rank for r in rows) == PUBLISHED[name] == RELEASES[name][3]
    assert sum(r.tensors for r in rows) == RELEASES[name][2]


def test_parts_of_flash_and_pro() -> None:
    """Against the sums that the specification gives by hand, in GB."""
    for name, experts, attention, shared, compressors in (
        ("v4-flash", 147.2, 4.6, 1.08, 0.53),
        ("v4-pro", 822.1, 18.3, 4.03, 1.35),
    ):
        rows = weight_rows(Weights.released(ModelConfig.preset(name)), Parallel(), held="released")
        sums = {g: sum(r.total for r in rows if r.group == g) / 1e9 for g in {r.group for r in rows}}
        assert sums[EXPERTS] == pytest.approx(experts, abs=0.05)
        assert sums["attention"] == pytest.approx(attention, abs=0.05)
        assert sums["shared experts"] == pytest.approx(shared, abs=0.005)
        assert sums["compressors"] == pytest.approx(compressors, abs=0.006)


@pytest.mark.parametrize(
    "parallel", [Parallel(8), Parallel(1, 8, 8), Parallel(4, 2, 8), Parallel(2, 4, 8)], ids=str
)
@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_the_ranks_together_hold_every_element(name: str, parallel: Parallel) -> None:
    """Elements over all ranks = elements of the model, each as often as its kind of tensor is copied."""

    def elements(kind: Kind, p: Parallel) -> int:
        shape = kind.on_rank(p).shape
        return shape[0] * (shape[1] if len(shape) > 1 else 1)

    for kind, count in Weights.released(ModelConfig.preset(name), draft=True).kinds.items():
        ranks = parallel.ranks
        if kind.expert and parallel.ep > 1:
            here, copies = count // parallel.ep, 1
        elif kind.axis is None:
            here, copies = count, ranks
        else:
            here, copies = count, parallel.dp
        assert here * elements(kind, parallel) * ranks == count * elements(kind, Parallel()) * copies, kind


def test_expanded_weights_are_counted_in_their_dtype() -> None:
    flash = ModelConfig.preset("v4-flash")
    rows = weight_rows(Weights.released(flash), Parallel(), held="bfloat16")
    assert {r.dtype for r in rows} == {"bf16", "f32", "i64"}
    experts = 43 * 256 * 3 * 4096 * 2048
    assert [r.total for r in rows if r.group == EXPERTS] == [2 * experts]


def test_layouts_follow_from_what_is_given() -> None:
    pro = ModelConfig.preset("v4-pro")
    assert choose(pro, 8) == Parallel(8)
    assert choose(pro, 8, dp=8) == Parallel(1, 8, 8)
    assert choose(pro, 8, tp=4) == Parallel(4, replicas=2)
    assert choose(pro, 16, tp=4, dp=4) == Parallel(4, 4, 16)
    assert choose(pro, 8, tp=8, ep=8) == Parallel(8, ep=8)
    assert str(Parallel(4, 2, 8)) == "TP4 DP2 EP8" and str(Parallel(1, 8, 8)) == "DP8 EP8"
    assert Parallel(4, 2, 8, replicas=2).pools == 4
    for parallel in alternatives(pro, 8):
        assert parallel.ranks * parallel.replicas == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num": 0}, "num is 0"),
        ({"num": 8, "tp": 3}, r"tp is 3 and dp is 1; .* must divide num \(8\)"),
        ({"num": 6, "tp": 3}, "tp is 3; for v4-flash it must be one of 1, 2, 4, 8"),
        ({"num": 16, "tp": 16}, "tp is 16"),
        ({"num": 8, "tp": 8, "ep": 4}, r"ep is 4; it must be 1 .* = 8"),
        ({"num": 6, "dp": 6}, "ep is 6; it must divide the 256 experts"),
    ],
)
def test_what_cannot_be_cut_is_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(ModelConfig.preset("v4-flash"), **given)


def test_a_part_of_a_model_and_one_that_is_made_up_are_counted_from_their_config(tmp_path: Path) -> None:
    whole, weights, _ = find_weights("v4-flash")
    few, less, where = find_weights("v4-flash", num_layers=8)
    assert (few.num_layers, few.left_out, few.draft) == (8, 35, "none")
    assert less.files[1] < weights.files[1] / 4 and where == ("the first 8 layers of the release, without 35")
    write_release(tmp_path, compress_ratios=[0, 4, 128])
    config, found, where = find_weights(str(tmp_path), num_layers=2)
    assert config.num_layers == 2 and where.startswith("the headers in")
    _, same, where = find_weights(str(tmp_path), num_layers=2, dummy=True)
    assert same.kinds == found.kinds and where == "config.json; weights are made up"
    with pytest.raises(ConfigError, match=r"num_layers is 44; v4-flash takes 3 .* to 43"):
        find_weights("v4-flash", num_layers=whole.num_layers + 1)
