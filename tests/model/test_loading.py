"""Reading a checkpoint: a rank reads its part and nothing else, by several threads, and says how far it is."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dsv4.errors import CheckpointError
from dsv4.model import files
from dsv4.model.config import ModelConfig
from dsv4.model.files import Files
from dsv4.model.names import tensors
from dsv4.model.parallel import Share
from dsv4.model.shards import ShardReader, Stored
from dsv4.model.survey import survey
from dsv4.model.weights import load_weights
from dsv4.ops.weight import Packed

from tests.support.checkpoints import write_base, write_release
from tests.support.ranks import cut_weights

SHAPE: dict[str, Any] = dict(
    compress_ratios=[0, 4, 128], moe_intermediate_size=256, o_groups=4, n_routed_experts=4
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), shards=3, **SHAPE)


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[Stored]:
    """What is read from now on."""
    taken: list[Stored] = []
    read = ShardReader.read

    def watch(self: ShardReader, place: Stored) -> np.ndarray:
        data = read(self, place)
        assert data.nbytes == place.size
        taken.append(place)
        return data

    monkeypatch.setattr(ShardReader, "read", watch)
    return taken


def _note(told: list[tuple[int, int]], done: int, total: int, _: str) -> None:
    told.append((done, total))


@pytest.mark.parametrize("whole_attention", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_each_byte_of_what_is_cut_once_and_the_rest_each(
    release: Path, ranks: int, whole_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = ModelConfig.from_dir(release), survey(release, ModelConfig.from_dir(release))
    origin, read = Files(found), []
    shares = [Share(r, ranks, whole_attention) for r in range(ranks)]
    for share in shares:
        told = [(0, 0)]
        with monkeypatch.context() as patch:
            taken = _watched(patch)
            load_weights(release, config, torch.float32, partial(_note, told), found=found, share=share)
        read.append(sum(place.size for place in taken))
        assert told[-1] == (read[-1], read[-1]) and told == sorted(told)
    cut, whole = 0, 0
    for name, _ in tensors(config):
        size = origin.size(name, None)
        if shares[0].cut(name, origin.spec(name)) is None:
            whole += size
        else:
            cut += size
    assert cut > whole / 2
    # a block of scales that two ranks share is read by both
    assert sum(read) == pytest.approx(cut + ranks * whole, rel=2e-3)
    assert max(read) == pytest.approx(cut / ranks + whole, rel=2e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scales", ["bytes", "numbers"])
def test_a_rank_has_the_cut_of_the_whole(release: Path, tmp_path: Path, scales: str, packed: bool) -> None:
    path = release
    if scales == "numbers":  # no powers of two in some: those are expanded
        path = write_base(tmp_path, lambda name, x: x * (1.1 if ".1.w2." in name else 1), **SHAPE)
    config = ModelConfig.from_dir(path)
    found = survey(path, config)
    whole = load_weights(path, found.config, torch.float32, packed=packed, found=found)
    for rank in range(2):
        to = Share(rank, 2)
        part = load_weights(path, found.config, torch.float32, packed=packed, found=found, share=to)
        wanted = cut_weights(found.config, whole, to)
        assert part.keys() == wanted.keys()
        for name, w in wanted.items():
            if isinstance(w, Packed):
                assert torch.equal(part[name].scales, w.scales), name  # type: ignore[union-attr]
                a, b = part[name].codes.view(torch.uint8), w.codes.view(torch.uint8)  # type: ignore[union-attr]
                assert torch.equal(a, b), name
            else:
                assert torch.equal(part[name], w), name  # type: ignore[arg-type]


def test_what_is_read_is_logged_and_threads_do_not_matter(
    release: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig.from_dir(release)
    caplog.set_level(logging.INFO, logger="dsv4.weights")
    loaded = []
    for threads in (1, 8):
        monkeypatch.setattr(files, "_MOST_THREADS", threads)
        names: list[str] = []
        share = Share(1, 2, whole_attention=True)
        weights = load_weights(
            release, config, torch.float32, lambda *t, n=names: n.append(t[2]), share=share
        )
        loaded.append((names, weights))
    assert loaded[0][0] == loaded[1][0]
    assert all(torch.equal(w, loaded[1][1][n]) for n, w in loaded[0][1].items())  # type: ignore[arg-type]
    said = re.findall(
        r"read ([\d.]+) of ([\d.]+) MB of tensors in .* \(rank 1 of 2; threads: (\d+)\)", caplog.text
    )
    assert said[0][2] == "1" and 2 <= int(said[1][2]) <= 8 and 0 < float(said[0][0]) < float(said[0][1])


def test_an_error_in_a_thread_ends_the_reading(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, read = _watched(monkeypatch), ShardReader.read

    def fails(self: ShardReader, place: Stored) -> np.ndarray:
        if len(taken) > 20:
            raise CheckpointError("the disk is gone")
        return read(self, place)

    monkeypatch.setattr(ShardReader, "read", fails)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        load_weights(release, ModelConfig.from_dir(release), torch.float32)
    assert len(taken) < 60  # of some hundred


def test_columns_of_a_file_that_ends_or_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(range(64)))
    place = Stored(file, "U8", (4, 16), 0, 64)
    with ShardReader() as reader:
        assert reader.read(place.columns(3, 5)).tolist() == [3, 4, 19, 20, 35, 36, 51, 52]
        assert reader.read(place.rows(1, 2)).tolist() == list(range(16, 32))
        file.write_bytes(bytes(40))
        with pytest.raises(CheckpointError, match=r"x\.safetensors became shorter while it was read"):
            reader.read(place.columns(3, 5))
        file.unlink()
        with pytest.raises(CheckpointError, match="No such file or directory"):
            reader.read(place.columns(3, 5))
