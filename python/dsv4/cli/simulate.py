"""`dsv4 simulate`: a request trace against the real core in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import LINE_EVERY, add_profile, note
from dsv4.cli.words import count, number, one_of, reader
from dsv4.config import EngineConfig, settle
from dsv4.errors import ConfigError
from dsv4.gpus import gpu
from dsv4.quantities import SHARE, counted

if TYPE_CHECKING:
    from dsv4._core import Trace
    from dsv4.simulate.engine import Engine

ROW_FORMATS = ("fp8_ds_mla", "bfloat16", "float32")
MANY_A_SECOND = 50
"""Requests that no single engine gets: times in seconds were read as ms."""
DEFAULTS = {"max_num_seqs": 64, "step_ms": "none"}
"""Where they differ from those of `dsv4 serve`: enough requests at a time for a GPU, and steps that only their tokens bound."""
INDEX_FORMATS = ("mxfp4", "fp8", "bfloat16", "float32")


def add_model(group: Any) -> None:
    """Which model on which GPU."""
    group.add_argument(
        "-m",
        "--model",
        default="v4-flash",
        metavar="MODEL",
        help="v4-flash, v4-pro, or a directory with config.json [v4-flash]",
    )
    group.add_argument("--gpu", default="b200", help="b200, h200, h100, … [b200]")


def add_reading(group: Any) -> None:
    """How a trace is read."""
    group.add_argument("--limit", type=count(), metavar="N", help="only the first N requests of a trace")
    group.add_argument(
        "--hash-block", type=count(), default=512, metavar="N", help="tokens of a hash id of a trace [512]"
    )
    group.add_argument(
        "--time-unit",
        default="ms",
        type=one_of("ms", "s"),
        metavar="ms|s",
        help="unit of timestamp and delay in the trace [ms]",
    )


def add_times(group: Any) -> None:
    """Where step times come from."""
    group.add_argument(
        "--step-model",
        metavar="X",
        help="a JSONL file of measured steps to fit, or name=number,… to override (names: docs/simulate.md)",
    )
    group.add_argument(
        "--coefficients",
        metavar="FILE",
        help="step model as `dsv4 calibrate` measured it; --gpu then says the memory alone",
    )


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="a request trace against the real core in virtual time",
        usage="%(prog)s TRACE... [flags]",
        epilog="examples:\n  dsv4 trace agents -o agents.jsonl\n  dsv4 simulate agents.jsonl --policy auto,turns/lru --gpu b200",
        description="Replays request traces against the real scheduler and cache, with a step-time model of the GPU.",
    )
    parser.add_argument(
        "traces",
        nargs="*",
        metavar="TRACE",
        help="JSON lines with timestamp (ms), input_length, output_length, hash_ids; session, delay, tenant, priority; "
        "also packed with gzip; - is standard input",
    )
    engine = parser.add_argument_group("engine")
    add_model(engine)
    _add_memory(engine)
    _add_limits(engine)
    load = parser.add_argument_group("load")
    _add_load(load)
    add_times(load)
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print JSON with timelines instead of a table")
    out.add_argument("--plot", metavar="FILE.png", help="memory and hit rate over time (needs matplotlib)")
    parser.set_defaults(run=run)


def _add_memory(group: Any) -> None:
    """GPUs, the pool, and what is kept in it."""
    defaults = EngineConfig.__dataclass_fields__
    snapshots, eviction = defaults["snapshot_policy"].default, defaults["eviction"].default
    add_profile(group)
    group.add_argument(
        "--tp",
        "--num",
        "--tensor-parallel-size",
        dest="tensor_parallel_size",
        type=count(),
        metavar="N",
        help="GPUs of the engine [fewest whose memory the weights fill to three quarters at most]",
    )
    group.add_argument(
        "--policy",
        metavar="NAME[,NAME…]",
        help=f"snapshot policies, each alone or with an eviction order as NAME/EVICTION [{snapshots}/{eviction}]",
    )
    group.add_argument(
        "--pool-gib",
        type=number(0, 1e6, open=True),
        metavar="X",
        help="page pool of each GPU [what --memory-fraction leaves]",
    )
    group.add_argument(
        "--memory-fraction",
        dest="gpu_memory_utilization",
        type=reader(SHARE, float),
        metavar="F",
        help="share of memory to use [0.9]",
    )
    group.add_argument(
        "--snapshot-budget",
        type=number(0, 1),
        metavar="F",
        help="largest share of the pool for snapshots (auto)",
    )


def _add_limits(group: Any) -> None:
    """What bounds requests, pages and steps."""
    group.add_argument("--max-num-seqs", type=count(), metavar="N", help="requests that run at a time [64]")
    group.add_argument(
        "--max-num-batched-tokens",
        type=count(),
        metavar="N",
        help="tokens of a step [4096, of several GPUs 8192]",
    )
    group.add_argument(
        "--max-num-waiting",
        type=count(),
        metavar="N",
        help="requests that queue in the core [1024]",
    )
    group.add_argument(
        "--block-size", type=count(), metavar="N", help="tokens of a page (default: as dsv4 serve has it)"
    )
    group.add_argument(
        "--index-cache-dtype",
        type=one_of(*INDEX_FORMATS),
        metavar="|".join(INDEX_FORMATS),
        help="format of index rows [mxfp4]",
    )
    group.add_argument(
        "--step-ms",
        type=_step_ms,
        metavar="MS",
        help="time budget of a step with decodes, auto as `dsv4 serve` has it, or none: only its tokens are bounded [none]",
    )
    group.add_argument(
        "--tenant", action="append", default=[], metavar="NAME=WEIGHT", help="a tenant's share [1]"
    )
    group.add_argument(
        "--kv-cache-dtype",
        type=one_of(*ROW_FORMATS),
        metavar="|".join(ROW_FORMATS),
        help="format of rows [fp8_ds_mla]",
    )


def _add_load(group: Any) -> None:
    """What requests come, and when."""
    group.add_argument(
        "--dump",
        metavar="FILE",
        help="in place of a trace: what Core.dump() returned; its live requests run on under its own policy",
    )
    group.add_argument(
        "--rate", metavar="R", help="requests per second, or such as 2x: so many times the trace's [1x]"
    )
    add_reading(group)
    group.add_argument(
        "--sequential", action="store_true", help="one request at a time, no timing: the cache alone"
    )


def _step_ms(text: str) -> float | str:
    """Of a flag that takes a number, `auto` or `none`."""
    return text if text in ("auto", "none") else number(0, 1e12, open=True)(text)


def run(arguments: argparse.Namespace) -> int:
    """Simulates every policy. Raises ConfigError for bad traces and settings."""
    from dsv4.simulate import plot
    from dsv4.simulate.compare import Policy, compare, resume

    settings = settle(vars(arguments), DEFAULTS)
    written = arguments.policy or f"{settings.snapshot_policy}/{settings.eviction}"
    policies = [Policy.parse(text, settings.eviction) for text in written.split(",")]
    if arguments.plot:
        plot.check(arguments.plot)
    if bool(arguments.traces) == bool(arguments.dump):
        raise ConfigError("give one or more TRACE files, or --dump FILE, and not both")
    engine, said = _engine(arguments, settings)
    began = time.monotonic()
    if arguments.dump:
        text = _read_dump(arguments.dump)
        note(said[1])
        try:
            with Progress() as progress:
                reports = resume(text, engine, progress)
        except ConfigError as e:
            flags = _LAYOUT_FLAGS if "another layout" in str(e) else ""
            raise ConfigError(f"{arguments.dump}: {e}{flags}") from None
        pool = reports["dump"]["pool"]["pages"] * reports["dump"]["pool"]["page_bytes"]
    else:
        trace, pool = _trace(arguments), engine.pool_bytes
        for line in (*said, _about(trace)):
            note(line)
        with Progress() as progress:
            reports = compare(trace, engine, policies, progress)
    note(f"{len(reports)} {'policies' if len(reports) > 1 else 'run'} in {time.monotonic() - began:.1f} s")
    title = f"{engine.config.name} on {engine.tp} x {engine.gpu.name}, pool {pool / 2**30:.1f} GiB"
    if arguments.json:
        print(json.dumps(_as_json(arguments, engine, reports)))
    else:
        _print_table(reports, title, arguments.sequential)
    if arguments.plot:
        plot.plot(reports, arguments.plot, title=title, sequential=arguments.sequential)
        note(f"picture in {arguments.plot}")
    return 0


_LAYOUT_FLAGS = (
    ": give --model, --kv-cache-dtype (rows), --index-cache-dtype (index) and --block-size (tokens of a page) as the server "
    "printed them when it started"
)


def _read_dump(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"dump {path}: {getattr(e, 'strerror', None) or e}") from None


def _engine(a: argparse.Namespace, settings: EngineConfig) -> tuple[Engine, list[str]]:
    """The engine, and lines that tell what was chosen."""
    from dsv4.plan.weights import find_weights
    from dsv4.simulate.engine import StepTimes, build

    (config, _, _), card = find_weights(a.model), gpu(a.gpu)
    pool = None if a.pool_gib is None else round(a.pool_gib * 2**30)
    times = StepTimes(a.coefficients, a.step_model)
    engine, about = build(
        config, card, settings, times, pool=pool, weights=_weights(a.tenant), sequential=a.sequential
    )
    return engine, [f"engine     {engine.describe()}", f"step model {about}"]


def _weights(items: list[str]) -> dict[str, float]:
    out: dict[str, float] = {}
    for item in items:
        name, _, value = item.rpartition("=")
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = 0.0
        if not name or not 0 < out[name] < 1e6:
            raise ConfigError(
                f"--tenant is {item!r}; write NAME=WEIGHT with a weight above 0, such as batch=0.5"
            )
    return out


def _trace(a: argparse.Namespace) -> Trace:
    from dsv4._core import Trace

    text = a.rate or "1x"
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise ConfigError(
            f"--rate is {a.rate!r}; write requests per second such as 4.5, or a factor such as 2x"
        )
    load: dict[str, Any] = {"speed": number} if text.endswith("x") else {"rate": number}
    if a.time_unit != "ms":
        load["time_unit"] = a.time_unit
    files = ["/dev/stdin" if name == "-" else name for name in a.traces]
    trace = Trace.read(files, hash_block=a.hash_block, limit=a.limit, **load)
    rate = len(trace) / trace.seconds if trace.seconds else 0.0
    if rate > MANY_A_SECOND and a.rate is None and a.time_unit == "ms" and not a.sequential:
        note(f"note       {rate:,.0f} requests a second: if the trace's times are seconds, say --time-unit s")
    return trace


def _about(trace: Trace) -> str:
    rate = f", {len(trace) / trace.seconds:.2f} a second" if trace.seconds else ""
    skipped = f"; fields not read: {', '.join(trace.skipped)}" if trace.skipped else ""
    return (
        f"trace      {counted(len(trace), 'request')} over {trace.seconds:,.0f} s{rate}; {trace.prompt_tokens / 1e6:,.1f}M prompt and "
        f"{trace.output_tokens / 1e6:,.2f}M output tokens{skipped}"
    )


def _print_table(reports: dict[str, dict[str, Any]], title: str, sequential: bool) -> None:
    from rich.console import Console

    from dsv4.simulate.table import table, tenants

    # Where it is not read on a terminal nothing is cut to its width.
    console = Console(width=None if sys.stdout.isatty() else 60 + 40 * len(reports))
    print(title + "\n")
    console.print(table(reports, sequential=sequential))
    parts = None if sequential else tenants(reports)
    if parts is not None:
        console.print(parts)
    for name, r in reports.items():
        if r["refused"]:
            print(f"{name}: {counted(r['refused'], 'request')} refused; the first: {r['first_refusal']}")


def _as_json(a: argparse.Namespace, e: Engine, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "traces": a.traces,
        "dump": a.dump,
        "requests": next(iter(reports.values()))["requests"],
        "engine": {
            "model": e.config.name,
            "gpu": e.gpu.name,
            "tp": e.tp,
            "pages": e.pages,
            "pool_bytes": e.pool_bytes,
            "block_tokens": e.layout.block_tokens,
            "profile": e.settings.profile,
            "max_num_seqs": e.settings.max_num_seqs,
            "max_num_batched_tokens": e.step_tokens,
            "max_len": e.max_len,
        },
        "sequential": e.sequential,
        "step_model": dict(e.coefficients),
        "policies": reports,
    }


class Progress:
    """A bar per policy on a terminal, else a line every few seconds. Standard error only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._next = time.monotonic() + LINE_EVERY

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __call__(self, policy: str, done: int, total: int, seconds: float) -> None:
        if self._bar is not None:
            if policy not in self._tasks:
                self._tasks[policy] = self._bar.add_task(policy, total=total)
            self._bar.update(
                self._tasks[policy], completed=done, description=f"{policy}  {seconds:,.0f} s virtual"
            )
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY
            note(f"{policy}: {done:,} of {counted(total, 'request')}, {seconds:,.0f} s virtual")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
