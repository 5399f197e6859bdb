"""Index tables: owners and places of runs."""

from __future__ import annotations

import pytest
import torch
from dsv4.ops.tables import runs, spread


@pytest.mark.parametrize("counts", [[], [0], [1], [2, 3], [0, 2, 0, 0, 1, 0], [5] * 40])
def test_owners_and_places(counts: list[int]) -> None:
    lengths = torch.tensor(counts, dtype=torch.int64)
    owner, place = runs(lengths)
    assert owner.tolist() == [i for i, n in enumerate(counts) for _ in range(n)] == spread(lengths).tolist()
    assert place.tolist() == [j for n in counts for j in range(n)]
