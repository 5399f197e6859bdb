"""Bias, penalties, minimum length and masks, as changes of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.tables import COUNT, END, PROMPT


def edit_logits(
    logits: Tensor,
    row: Tensor,
    bias: Tensor,
    marks: Tensor,
    penalties: Tensor,
    until: Tensor,
    position: Tensor,
) -> Tensor:
    """float32 [S, V], a copy of `logits` with each row changed as row `row[s]` of the tables says (see
    `tables.COUNT`), in the order of vLLM: bias, repetition penalty on tokens of prompt and output, presence and frequency
    penalty on tokens of the output, and end tokens made impossible as long as `position` is below `until`."""
    mark = marks[row]
    count = mark & COUNT
    repetition, presence, frequency = penalties[row].unsqueeze(-1).unbind(1)
    value = logits + bias[row]
    scaled = torch.where(value > 0, value / repetition, value * repetition)
    value = torch.where(mark & (COUNT | PROMPT) != 0, scaled, value)
    value = value - torch.where(count > 0, presence + frequency * count, 0)
    early = (position < until[row]).unsqueeze(1)
    return torch.where((mark & END != 0) & early, -torch.inf, value)


def mask_logits(logits: Tensor, row: Tensor, masks: Tensor) -> None:
    """Rows [S, V] with row[s] >= 0, in place: -inf where masks[row[s]], int32 [M, ceil(V / 32)], has no bit. What is no number
    or +inf stays: by it a broken row is known."""
    some = torch.nonzero(row >= 0).flatten()
    if not len(some):
        return
    value = logits[some]
    bits = masks[row[some]].unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    barred = bits.flatten(1)[:, : value.shape[1]] == 0
    logits[some] = torch.where(barred & (value < torch.inf), -torch.inf, value)
