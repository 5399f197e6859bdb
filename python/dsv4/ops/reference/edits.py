"""Bias, penalties and minimum length, as changes of logits."""

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
