"""A checkpoint's tensors, as floats or as they are stored, checked against the config before any big read.

Reads the released naming and formats, and what `save_pretrained` of transformers writes. Only .safetensors
and .json files are opened; no code of a model directory runs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch

from dsv4.errors import CheckpointError
from dsv4.model.config import ModelConfig
from dsv4.model.dummy import Dummy
from dsv4.model.files import PACKED, Files
from dsv4.model.names import TensorSpec, expert_shapes, is_expert, tensors
from dsv4.model.parallel import ALL, Share
from dsv4.model.survey import Survey, survey
from dsv4.ops.weight import Fp8Weight, Packed, Weight

log = logging.getLogger("dsv4.weights")

Progress = Callable[[int, int, str], None]
"""Called after each tensor: bytes read, bytes in all, the tensor's name."""

_LARGE_SCALE = 240
"""From this byte (2^113) on a scaled value may leave float32."""


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    packed: bool = False,
    device: torch.device | str = "cpu",
    draft: bool = False,
    found: Survey | None = None,
    share: Share = ALL,
) -> dict[str, Weight]:
    """All tensors of the model on `device` under their released names, `float` ones as `dtype` (float32 or bfloat16).

    FP8 and FP4 matrices are expanded, or, if `packed`, kept as they are stored (`ops.weight`) where `survey` says that they
    can be; experts are stacked as `layers.N.ffn.experts.w1|w3|w2` [E, out, in]; what the release stores as F32
    (hyper-connections, sinks, ape, gate bias) stays float32; tid2eid is int64. Draft tensors (`mtp.*`) come with
    `draft`, else they are skipped and their number is logged. `found`: the survey of `path`, if there is one already; one
    `without_files` is made up. `share`: the rank whose part of each tensor it is (`Files.read`); how much is read of what, by how many
    threads, is logged. Raises CheckpointError, ConfigError with one line.
    """
    found = found or survey(Path(path), config, draft=draft)
    # The current device is a thread's own, so one without a number is looked up here.
    device = torch.empty(0, device=device).device
    skipped = [] if draft else [n for n in found.stored if n.startswith("mtp.")]
    if skipped:
        log.info("skipped %d draft tensors (mtp.*): speculation is off", len(skipped))
    origin = Files(found) if found.seed is None else Dummy(found, device)
    expected = dict(tensors(config, draft=draft))
    cuts = {name: share.cut(name, origin.spec(name)) for name in expected}
    sizes = {name: origin.size(name, cut) for name, cut in cuts.items()}
    weights = _expert_stacks(found, dtype, share, packed=packed, device=device)

    def take(name: str) -> str:
        value = origin.read(name, cuts[name])
        if isinstance(value, Packed) and not packed:
            value = value.dense()
        if found.seed is None:
            _check_values(name, value, config)
        storage = expected[name].storage
        if storage == "i64":
            value = value.to(torch.int64)
        else:
            value = value.to(torch.float32 if storage == "f32" else dtype)
        _place(weights, name, value, device)
        return name

    total, done, begun = sum(sizes.values()), 0, time.monotonic()
    with origin:
        for name in _done(take, origin.order(list(expected)), origin.threads):
            done += sizes[name]
            if progress is not None:
                progress(done, total, name)
    how = "read" if found.seed is None else "made up"
    part, whole = (f"{n / 1e6:,.1f}" for n in (done, sum(origin.size(name, None) for name in expected)))
    took, of = time.monotonic() - begun, f"rank {share.rank} of {share.ranks}; threads: {origin.threads}"
    log.info("%s %s of %s MB of tensors in %.1f s (%s)", how, part, whole, took, of)
    return weights


def _done(take: Callable[[str], str], names: list[str], threads: int) -> Iterator[str]:
    """Each name as it is taken, in order. No more than a few tensors a thread are under way, and none after an error."""
    if threads == 1:
        yield from map(take, names)
        return
    with ThreadPoolExecutor(threads, "weights") as pool:
        under_way: deque[Future[str]] = deque()
        try:
            for name in names:
                under_way.append(pool.submit(take, name))
                if len(under_way) > 4 * threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for late in under_way:
                late.cancel()


def expanded_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of what `load_weights` gives without `packed`."""
    width = {"f32": 4, "i64": 8}
    return sum(prod(spec.shape) * width.get(spec.storage, dtype.itemsize) for _, spec in tensors(config))


def _check_values(name: str, value: Weight, config: ModelConfig) -> None:
    """What shapes and dtypes cannot show: damage that would come out as wrong tokens or an index error."""
    if isinstance(value, Packed):
        if int(value.scales.max()) >= _LARGE_SCALE:
            _check_values(name, value.dense(), config)
        if isinstance(value, Fp8Weight) and (value.codes.view(torch.uint8) & 0x7F == 0x7F).any():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
    elif value.is_floating_point():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
    elif value.numel() and not 0 <= int(value.min()) <= int(value.max()) < config.num_experts:
        low, high = int(value.min()), int(value.max())
        raise CheckpointError(
            f"tensor {name} names experts {low} to {high}; the model has {config.num_experts}"
        )


def _expert_stacks(
    found: Survey, dtype: torch.dtype, share: Share, *, packed: bool, device: torch.device
) -> dict[str, Weight]:
    """Room for the experts: packed where the survey says that a stack can be."""
    stacks: dict[str, Weight] = {}
    count = found.config.num_experts
    blocks = dict.fromkeys(n.partition(".experts.")[0] for n in found.kept if is_expert(n))
    for block in blocks:
        for proj, _ in expert_shapes(found.config):
            name = f"{block}.experts.0.{proj}.weight"
            shape, kind = share.of(name, found.kept[name]).shape, found.kept[name].storage
            if not packed or kind not in PACKED:
                stack: Weight = torch.empty((count, *shape), dtype=dtype, device=device)
            else:
                (_, _, codes), (_, _, scales) = TensorSpec(shape, kind).stored(name)
                code = torch.uint8 if kind == "fp4" else torch.float8_e4m3fn
                stack = PACKED[kind](
                    torch.empty((count, *codes), dtype=code, device=device),
                    torch.empty((count, *scales), dtype=torch.uint8, device=device),
                    dtype,
                )
            stacks[f"{block}.experts.{proj}"] = stack
    return stacks


def _place(weights: dict[str, Weight], name: str, value: Weight, device: torch.device | str) -> None:
    """Into the dict, or into its expert's place in the stack."""
    head, _, tail = name.partition(".ffn.experts.")
    if not tail:
        weights[name] = value.to(device)
        return
    expert, part, _ = tail.split(".")
    stack = weights[f"{head}.ffn.experts.{part}"]
    if isinstance(stack, Packed):
        assert isinstance(value, Packed), "a stack is packed only where all its experts are"
        stack.codes[int(expert)], stack.scales[int(expert)] = value.codes, value.scales
    else:
        stack[int(expert)] = value.dense() if isinstance(value, Packed) else value
