"""Sinkhorn's normalisation with a backward pass through its fixed point: one kernel each on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs none
    triton = None

_EPS = 1e-6
_BLOCK = 128


def forward_torch(logits: Tensor, rounds: int) -> Tensor:
    """[..., 4, 4] -> doubly stochastic; as `dsv4.ops.reference.hyper` does it."""
    a = logits.softmax(-1) + _EPS
    a = a / (a.sum(-2, keepdim=True) + _EPS)
    for _ in range(rounds - 1):
        a = a / (a.sum(-1, keepdim=True) + _EPS)
        a = a / (a.sum(-2, keepdim=True) + _EPS)
    return a


def backward_torch(a: Tensor, grad: Tensor, rounds: int) -> Tensor:
    """The gradient of the logits from the result: that of the fixed point, 1e-5 off the unrolled one."""
    h = a * grad
    columns = torch.zeros_like(a[..., 0])
    for _ in range(rounds):
        rows = h.sum(-1) - (a * columns[..., None, :]).sum(-1)
        columns = h.sum(-2) - (a * rows[..., :, None]).sum(-2)
    return h - a * (rows[..., :, None] + columns[..., None, :])


if triton:

    @triton.jit
    def _kernel(source, grad, out, count, ROUNDS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = t[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        live = (t < count)[:, None, None]
        a = tl.load(source + at, mask=live, other=0.0)
        if BACKWARD:
            h = a * tl.load(grad + at, mask=live, other=0.0)
            h_rows = tl.sum(h, 2)
            h_columns = tl.sum(h, 1)
            rows = h_rows
            columns = h_columns * 0
            for _ in range(ROUNDS):
                rows = h_rows - tl.sum(a * columns[:, None, :], 2)
                columns = h_columns - tl.sum(a * rows[:, :, None], 1)
            a = h - a * (rows[:, :, None] + columns[:, None, :])
        else:
            a = tl.exp(a - tl.max(a, 2)[:, :, None])
            a = a / tl.sum(a, 2)[:, :, None] + 1e-6
            a = a / (tl.sum(a, 1)[:, None, :] + 1e-6)
            for _ in range(ROUNDS - 1):
                a = a / (tl.sum(a, 2)[:, :, None] + 1e-6)
                a = a / (tl.sum(a, 1)[:, None, :] + 1e-6)
        tl.store(out + at, a, mask=live)


def _launch(source: Tensor, grad: Tensor, rounds: int, backward: bool) -> Tensor:
    out, count = torch.empty_like(source), source.numel() // 16
    _kernel[(triton.cdiv(count, _BLOCK),)](source, grad, out, count, rounds, backward, _BLOCK)
    return out


@torch.library.custom_op("nano::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, rounds: int) -> Tensor:
    """float32 [..., 4, 4] -> the same shape."""
    if not logits.is_cuda:
        return forward_torch(logits, rounds)
    logits = logits.contiguous()
    return _launch(logits, logits, rounds, backward=False)


@torch.library.custom_op("nano::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(a: Tensor, grad: Tensor, rounds: int) -> Tensor:
    if not a.is_cuda:
        return backward_torch(a, grad, rounds)
    return _launch(a.contiguous(), grad.contiguous(), rounds, backward=True)


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.rounds = inputs[1]


def _adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _sinkhorn_backward(ctx.saved_tensors[0], grad, ctx.rounds), None


sinkhorn.register_fake(_like)
_sinkhorn_backward.register_fake(_like)
sinkhorn.register_autograd(_adjoint, setup_context=_keep)
