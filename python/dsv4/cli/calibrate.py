"""`dsv4 calibrate`: how long steps take on the device at hand, as a file for `dsv4 simulate --coefficients`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_settings, note, read_settings
from dsv4.cli.words import number
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4.engine.llm import LLM
    from dsv4.simulate.calibrate import Measured
    from dsv4.simulate.coefficients import Calibration
    from dsv4.simulate.fitting import Judged
    from dsv4.simulate.shapes import Shape

UNKNOWN = "h100"
"""Whose roofline is scaled where a device is none of dsv4.gpus."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure how long steps take here, for dsv4 simulate",
        usage="%(prog)s [MODEL] [-o FILE] [--seconds S] [flags]",
        description="Runs steps of designed shapes on the device at hand (prompts read in chunks, states restored, decodes of several "
        "batch sizes and contexts, both together), fits the step model to them, prints it beside steps that were not fitted, and "
        "writes a file for `dsv4 simulate --coefficients`.",
        epilog="examples:\n  dsv4 calibrate -o nano.json\n  dsv4 calibrate /models/DeepSeek-V4-Flash -o flash.json --load-format dummy "
        "--num-layers 8",
    )
    parser.add_argument(
        "-o", "--output", default="coefficients.json", metavar="FILE", help="[coefficients.json]"
    )
    parser.add_argument(
        "--seconds",
        type=number(1, 3600),
        default=45.0,
        metavar="S",
        help="longest time that steps are measured, after load and warm-up [45]",
    )
    add_settings(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, fits, prints and writes. Raises ConfigError, also where there was too little time."""
    from dsv4.cli.talking import load_model
    from dsv4.simulate.fitting import fit

    (config,) = read_settings(arguments, EngineConfig)
    if (config.tensor_parallel_size or 1) > 1:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}; calibrate measures one device: give 1"
        )
    output = Path(arguments.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(
            f"--output {output}: {'it is a folder' if output.is_dir() else 'there is no such folder'}"
        )
    with _record(config.record_steps) as record:
        config = dataclasses.replace(config, tensor_parallel_size=1, record_steps=str(record))
        llm = load_model(config)
        steps = _measure(llm, record, arguments.seconds)
    device, roofline = _device(llm)
    coefficients = _roofline(llm, roofline)
    judged = fit(coefficients, steps)
    calibration = _calibration(llm, judged, device, roofline)
    calibration.write(arguments.output)
    _print(judged)
    note(
        f"{judged.fit}; on the {len(judged.held)} steps held back {judged.median_error:.1%} median, {judged.p90_error:.1%} in 9 of 10"
    )
    if llm.model_config.left_out:
        layers = llm.model_config.num_layers
        note(
            f"measured: {layers} of {layers + llm.model_config.left_out} layers; for the whole depth the overhead grows with the layers, "
            "and reads, arithmetic and copies follow from all layers' shapes by the factors above"
        )
    note(f"coefficients in {arguments.output}; dsv4 simulate --coefficients reads them")
    return 0


@contextmanager
def _record(path: str | None) -> Iterator[Path]:
    """Where the engine records steps: what --record-steps says, else a file that goes away."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "steps.jsonl"


def _measure(llm: LLM, record: Path, seconds: float) -> list[Measured]:
    from dsv4.engine.measuring import Measuring

    measuring = Measuring(llm, record)
    note("warm-up, not counted")
    measuring.warm_up()
    begun = time.monotonic()

    def progress(done: int, total: int, shape: Shape) -> None:
        note(f"{time.monotonic() - begun:5.1f} of {seconds:g} s  shape {done + 1} of {total}: {shape.name}")

    steps = [step for some in measuring.run(seconds, progress) for step in some]
    llm.close()
    note(f"{counted(len(steps), 'step')} in {time.monotonic() - begun:.1f} s")
    return steps


def _device(llm: LLM) -> tuple[str, str]:
    """(what the device is called, whose roofline is scaled)."""
    from dsv4.gpus import gpu

    if llm.config.device != "cuda":
        return "cpu", UNKNOWN
    import torch

    name = torch.cuda.get_device_name()
    try:
        return name, gpu(name).name
    except ConfigError:
        return name, UNKNOWN


def _roofline(llm: LLM, name: str) -> dict[str, Any]:
    from dsv4.gpus import gpu
    from dsv4.simulate.device import step_coefficients

    c = llm.config
    layout = llm.model_config.layout(c.kv_cache_dtype, c.index_cache_dtype, block_tokens=c.block_size)
    return step_coefficients(llm.model_config, layout, gpu(name), 1)


def _calibration(llm: LLM, judged: Judged, device: str, roofline: str) -> Calibration:
    from dsv4.simulate.coefficients import Calibration, size_of

    fit = judged.fit
    return Calibration(
        llm.model_config.name, size_of(llm.model_config), device, roofline, llm.config.kv_cache_dtype, llm.config.index_cache_dtype,
        llm.model_config.num_layers, fit.overhead_us, fit.reads, fit.arithmetic, fit.copies, fit.steps,
        judged.median_error, judged.p90_error,
    )  # fmt: skip


def _print(judged: Judged) -> None:
    from rich.console import Console

    from dsv4.simulate.fitting import table

    Console(width=None if sys.stdout.isatty() else 110).print(table(judged))
    if judged.left_out:
        note(f"left out: {counted(judged.left_out, 'step')} of over three times the median of its kind")
