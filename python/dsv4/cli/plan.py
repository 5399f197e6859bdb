"""`dsv4 plan`: what fits on which GPUs, to the byte, without one."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_numbers, add_profile, model_of
from dsv4.cli.words import count, number, one_of
from dsv4.config import settle, step_tokens
from dsv4.errors import ConfigError
from dsv4.gpus import GPUS, gpu

if TYPE_CHECKING:
    from dsv4.plan.build import Question

INDEX_FORMATS = {"fp4": "mxfp4", "fp8": "fp8", "bfloat16": "bfloat16", "float32": "float32"}
WEIGHTS = ("released", "bfloat16", "float32")
MODELS = "v4-flash, v4-pro, v4-flash-preview, v4-pro-preview, a directory, a config.json, or org/name in the local hub cache"
EVERY = "2048,8192,32768"
NUMBERS = {
    "max_num_seqs": (),
    "max_num_batched_tokens": ("max-step-tokens",),
    "block_size": (),
    "num_layers": (),
    "gpu_memory_utilization": (),
    "snapshot_budget": (),
}
"""Settings of the engine that are asked for here too, with further names of their flags."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits on which GPUs, to the byte, without one",
        usage="%(prog)s MODEL --gpu NAME [flags]",
        description="Weights, cache, workspace and capacity of a model on given GPUs, with every formula.",
        epilog="examples:\n  dsv4 plan v4-flash --gpu b200\n  dsv4 plan v4-pro --gpu h200 --num 8 --max-model-len 128k --json",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODELS)
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="MODEL as a flag")
    _add_gpus(parser)
    _add_formats(parser)
    _add_shown(parser)
    parser.set_defaults(run=run)


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    """On what, how it is divided, and what bounds requests."""
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)} (must be given)")
    parser.add_argument("--num", type=count(), default=1, metavar="N", help="GPUs in all [1]")
    parser.add_argument(
        "--tp",
        "--tensor-parallel-size",
        dest="tensor_parallel_size",
        type=count(),
        metavar="N",
        help="GPUs that share each request [what num and dp leave]",
    )
    parser.add_argument(
        "--dp",
        "--data-parallel-size",
        type=count(),
        metavar="N",
        help="groups of tp GPUs that serve requests of their own [1]",
    )
    parser.add_argument(
        "--ep", type=count(), metavar="N", help="1, or tp * dp: whole experts over all GPUs [by dp]"
    )
    parser.add_argument(
        "--pool-gb",
        type=number(0, 1e6, open=True),
        metavar="GB",
        help="size of a GPU's page pool in 10^9 bytes [what is left]",
    )
    parser.add_argument(
        "--max-model-len",
        "--max-len",
        dest="max_model_len",
        type=count(such="64k or 1M"),
        metavar="N",
        help="longest request, such as 64k or 1M [the model's]",
    )
    add_numbers(parser, NUMBERS)
    add_profile(parser)


def _add_formats(parser: argparse.ArgumentParser) -> None:
    """How rows and weights are stored, and which are counted."""
    parser.add_argument(
        "--rows", dest="kv_cache_dtype", metavar="FORMAT", help="fp8_ds_mla, bfloat16, float32 [fp8_ds_mla]"
    )
    parser.add_argument(
        "--index",
        type=one_of(*INDEX_FORMATS),
        metavar="|".join(INDEX_FORMATS),
        help="format of index rows [fp4]",
    )
    parser.add_argument(
        "--weights",
        default="released",
        type=one_of(*WEIGHTS),
        metavar="|".join(WEIGHTS),
        help="how weights are kept [released]",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of org/name [main, or the newest]"
    )
    parser.add_argument(
        "--load-format",
        default="auto",
        type=one_of("auto", "safetensors", "dummy"),
        metavar="auto|safetensors|dummy",
        help="dummy counts weights from config.json alone, as serve --load-format dummy makes them [auto]",
    )
    parser.add_argument("--draft", action="store_true", help="count the drafter's weights too")


def _add_shown(parser: argparse.ArgumentParser) -> None:
    """What the plan assumes of steps and turns, and how it is printed."""
    parser.add_argument(
        "--graphs",
        type=count(0),
        metavar="N",
        help="steps captured as CUDA graphs, 0 with --enforce-eager [sizes times contexts]",
    )
    parser.add_argument(
        "--every", default=EVERY, metavar="N,N", help=f"spacings of every:N to show [{EVERY}]"
    )
    parser.add_argument(
        "--turn-tokens", type=count(), metavar="N", help="new tokens of a turn, for turns and forks [4340]"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan. Raises ConfigError for what cannot be asked or does not fit."""
    from dsv4.plan.build import answer
    from dsv4.plan.report import as_json, as_text

    plan = answer(question(arguments))
    print(json.dumps(as_json(plan), indent=2, default=str) if arguments.json else as_text(plan))
    return 0


def question(a: argparse.Namespace) -> Question:
    """The flags as a question. Raises ConfigError."""
    from dsv4.model.parallel import choose
    from dsv4.plan.build import Question
    from dsv4.plan.cache import Traffic
    from dsv4.plan.weights import find_weights
    from dsv4.plan.workspace import Limits

    model = model_of(a)
    if model is None:
        raise ConfigError(f"MODEL is missing; it is one of {MODELS}")
    if a.gpu is None:
        raise ConfigError(f"--gpu is missing; known are {', '.join(GPUS)}")
    config, weights, counted_from = find_weights(
        model, a.revision, draft=a.draft, num_layers=a.num_layers, dummy=a.load_format == "dummy"
    )
    index = {} if a.index is None else {"index_cache_dtype": INDEX_FORMATS[a.index]}
    settings = settle(vars(a) | index, {})
    max_len = settings.max_model_len or config.max_position
    if max_len > config.max_position:
        raise ConfigError(f"--max-model-len is {max_len}; {config.name} takes 1 to {config.max_position}")
    rows, index_rows = (
        usual if given == "auto" else given
        for given, usual in ((settings.kv_cache_dtype, "fp8_ds_mla"), (settings.index_cache_dtype, "mxfp4"))
    )
    running = settings.max_num_seqs
    parallel = choose(config, a.num, settings.tensor_parallel_size, a.dp, a.ep)
    tokens = step_tokens(settings, "cuda", parallel.tp)
    return Question(
        config=config,
        weights=weights,
        layout=config.layout(rows, index_rows, block_tokens=settings.block_size),
        gpu=gpu(a.gpu),
        num=a.num,
        parallel=parallel,
        limits=Limits(tokens, running, max_len, a.graphs),
        memory_fraction=settings.gpu_memory_utilization,
        pool_bytes=None if a.pool_gb is None else round(a.pool_gb * 1e9),
        snapshot_budget=settings.snapshot_budget,
        every=_spacings(a.every),
        traffic=Traffic() if a.turn_tokens is None else Traffic(turn_tokens=a.turn_tokens),
        draft=a.draft,
        held=a.weights,
        counted_from=counted_from,
        tokens_given=settings.max_num_batched_tokens is not None,
    )


def _spacings(text: str) -> tuple[int, ...]:
    """'2048,8192' -> (2048, 8192)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    bad = next((p for p in parts if not p.isdecimal() or int(p) < 1), None)
    if bad is not None:
        raise ConfigError(f"--every has {bad!r}; it takes whole numbers from 1, such as {EVERY}")
    return tuple(int(p) for p in parts)
