"""FP8 projections of Flash and Pro as the model runs them on this GPU, quantisation of the activations included; with many
tokens the Triton kernel too, where another one is chosen. The peer is cuBLAS through torch's blockwise scaled_mm, given
activations that are quantised already."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from dsv4.backends import choose
from dsv4.kernels.triton import gemm
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.weight import Fp8Weight
from torch import Tensor

from benches.gpu.timing import Bench, Row, max_abs_err

SHAPES: dict[str, tuple[int, int, int]] = {
    "Flash wq_a, wkv": (1, 1536, 4096),
    "Flash wq_b": (1, 32768, 1024),
    "Flash index wq_b": (1, 8192, 1024),
    "Flash wo_a": (8, 1024, 4096),
    "Flash wo_b": (1, 4096, 8192),
    "Flash shared w2": (1, 4096, 2048),
    "Pro wq_a, wkv": (1, 2048, 7168),
    "Pro wq_b": (1, 65536, 1536),
    "Pro wo_a": (16, 1024, 4096),
    "Pro wo_b": (1, 7168, 16384),
}
"""groups, rows of a group, channels of a group."""

QUICK = ("Flash wq_a, wkv", "Flash wq_b", "Flash wo_a", "Flash wo_b", "Pro wo_b")
TOKENS = (1, 8, 32, 128, 2048, 8192)


def weights(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random e4m3 codes and ue8m0 scales near 2^-10."""
    codes = torch.randn((rows, width), device=device, dtype=torch.bfloat16).mul_(60).clamp_(-448, 448)
    scales = torch.randint(116, 119, (rows // 128, width // 128), device=device, dtype=torch.uint8)
    return codes.to(torch.float8_e4m3fn), scales


def expected(codes: Tensor, xs: Tensor, w: Tensor, ws: Tensor, groups: int, last: int) -> Tensor:
    """The last tokens' results in float32 from the same quantised inputs."""
    tokens = slice(codes.shape[0] - last, None)
    x = codes[tokens].float() * xs.t()[tokens].repeat_interleave(128, 1)
    wide = torch.exp2(ws.float() - 127).repeat_interleave(128, 0)
    out, rows = [], w.shape[0] // groups
    for g in range(groups):
        at = slice(g * rows, (g + 1) * rows)
        dense = w[at].float() * wide[at].repeat_interleave(128, 1)
        out.append(x.unflatten(1, (groups, -1))[:, g] @ dense.t())
    return torch.cat(out, 1)


def cublas(codes: Tensor, xs: Tensor, w: Tensor, ws: Tensor) -> Callable[[], Tensor] | None:
    """cuBLAS with the same blocks, or None where this torch or GPU has it not."""
    try:
        from torch.nn.functional import ScalingType, scaled_mm
    except ImportError:
        return None
    scale = torch.nn.functional.pad(torch.exp2(ws.float() - 127), (0, -ws.shape[1] % 4)).t()
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    run = lambda: scaled_mm(codes, w.t(), xs.t(), kinds[0], scale, kinds[1], output_dtype=torch.bfloat16)  # noqa: E731
    try:
        run()
    except (RuntimeError, ValueError) as e:
        print(f"no cuBLAS blockwise product: {str(e)[:200]}", file=sys.stderr)
        return None
    return run


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    ops = choose("auto", "cuda")
    print(f"gemm_fp8 runs on {', else '.join(map(str, ops.chains['linear']))}")
    for name in QUICK if bench.quick else SHAPES:
        groups, out, width = SHAPES[name]
        w, ws = weights(groups * out, width, bench.device)
        op = "linear" if groups == 1 else "grouped_linear"
        packed = ops.prepare(op, Fp8Weight(w, ws, torch.bfloat16))
        for tokens in TOKENS:
            x = torch.randn((tokens, groups * width), device=bench.device, dtype=torch.bfloat16)
            shaped = x if groups == 1 else x.unflatten(1, (groups, width))
            codes, xs = quantise(x, groups)
            last = min(tokens, 32)
            truth = expected(codes, xs, w, ws, groups, last)
            runs = {"": partial(getattr(ops, op), shaped, packed)}
            if tokens >= 2048 and ops.chains[op][0].backend != "triton":
                runs[" (Triton)"] = partial(gemm.wide, x, w, ws, out_dtype=torch.bfloat16, groups=groups)
            for label, run in runs.items():
                error = max_abs_err(run()[-last:].flatten(1), truth)
                peer = cublas(codes, xs, w, ws) if groups == 1 and tokens % 4 == 0 else None
                yield Row(
                    "gemm_fp8",
                    f"{name} {groups} x {out} x {width}{label}",
                    tokens,
                    0,
                    bench.us(run),
                    w.numel() + ws.numel() + 2 * x.numel() + 2 * tokens * groups * out,
                    2 * tokens * w.numel(),
                    "fp8",
                    "cuBLAS" if peer else "",
                    bench.us(peer) if peer else None,
                    error,
                )
