"""A file of what `dsv4 calibrate` measured: the factors of the step model, and what they hold for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.errors import ConfigError
from dsv4.gpus import gpu
from dsv4.model.config import ModelConfig
from dsv4.simulate.calibrate import scaled
from dsv4.simulate.device import step_coefficients
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

VERSION = 1


def size_of(config: ModelConfig) -> str:
    """Of all layers, also where some are left out; models of one size take as long, whatever their directory is called."""
    return (
        f"{config.num_layers + config.left_out} layers of {config.hidden_size}, {config.num_heads} heads, "
        f"{config.num_experts} experts"
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors over the roofline of `roofline`, a GPU of `dsv4.gpus`; on another device they hold just the same."""

    model: str
    """Its name; a model of the same size may have another one."""
    size: str
    """`size_of` the whole model."""
    device: str
    """What was measured, as its maker calls it."""
    roofline: str
    kv_cache_dtype: str
    index_cache_dtype: str
    layers: int
    """Of the model that were measured."""
    overhead_us: float
    """Of a step of so many layers."""
    reads: float
    arithmetic: float
    copies: float
    steps: int
    """That were fitted."""
    median_error: float
    """Half of the steps that were held back are off by at most this share."""
    p90_error: float
    version: int = VERSION

    def coefficients(self, config: ModelConfig, layout: LayoutSpec, tp: int) -> dict[str, Any]:
        """Of the whole model over `tp` GPUs. The overhead grows with the layers; reads, arithmetic and copies follow from the
        shapes of all layers by the measured factors. Collectives are assumed, as one device has none."""
        plain = step_coefficients(config, layout, gpu(self.roofline), tp)
        overhead = self.overhead_us * config.num_layers / self.layers
        return scaled(plain, overhead, self.reads, self.arithmetic, self.copies)

    def check(self, config: ModelConfig, kv_cache_dtype: str, index_cache_dtype: str) -> None:
        """Raises ConfigError where another model or other formats were measured."""
        if (size := size_of(config)) != self.size:
            raise ConfigError(
                f"coefficients were measured with {self.model} ({self.size}), and the model is {config.name} ({size})"
            )
        for flag, own, asked in (
            ("kv-cache-dtype", self.kv_cache_dtype, kv_cache_dtype),
            ("index-cache-dtype", self.index_cache_dtype, index_cache_dtype),
        ):
            if own != asked:
                raise ConfigError(
                    f"coefficients were measured with --{flag} {own}, and it is {asked}; give --{flag} {own}"
                )

    def about(self, config: ModelConfig, tp: int) -> str:
        """One line: where the figures come from and what is assumed."""
        layers = "" if self.layers == config.num_layers else f", {self.layers} of {config.num_layers} layers"
        return (
            f"measured on {self.device}{layers}: {self.steps} steps, error {self.median_error:.1%} median"
            f"{'; collectives assumed' if tp > 1 else ''}"
        )

    def write(self, path: str) -> None:
        """Raises ConfigError where the file cannot be written."""
        try:
            Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        except (OSError, ValueError) as e:
            raise ConfigError(f"coefficients {path}: {getattr(e, 'strerror', None) or e}") from None

    @classmethod
    def read(cls, path: str) -> Calibration:
        """Raises ConfigError naming file, field and value."""
        try:
            record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"coefficients {path}: {e.strerror}") from None
        except ValueError:
            raise ConfigError(f"coefficients {path} is no JSON; it takes a file of dsv4 calibrate") from None
        _check_names(path, record, [f.name for f in dataclasses.fields(cls)])
        if record["version"] != VERSION:
            raise ConfigError(
                f"coefficients {path}: version is {record['version']!r}; {VERSION} is read, run dsv4 calibrate again"
            )
        for f in dataclasses.fields(cls):
            _check_field(path, f.name, str(f.type), record[f.name])
        try:
            gpu(record["roofline"])
        except ConfigError as e:
            raise ConfigError(f"coefficients {path}: roofline: {e}") from None
        return cls(**record)


def _check_names(path: str, record: object, names: list[str]) -> None:
    if not isinstance(record, dict):
        raise ConfigError(
            f"coefficients {path}: it must be an object with {', '.join(names)}, as dsv4 calibrate writes it"
        )
    unknown = next((name for name in record if name not in names), None)
    if unknown is not None:
        raise ConfigError(
            f"coefficients {path}: it has the unknown field {unknown!r}; run dsv4 calibrate again{nearest(unknown, names)}"
        )
    missing = next((name for name in names if name not in record), None)
    if missing is not None:
        raise ConfigError(f"coefficients {path}: it has no {missing}; run dsv4 calibrate again")


def _check_field(path: str, name: str, kind: str, value: object) -> None:
    if kind == "str":
        good, words = isinstance(value, str), "a text"
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
        least = kind == "float" or (isinstance(value, int) and value > 0)
        good, words = number and least, "a number from 0" if kind == "float" else "a whole number from 1"
    if not good:
        raise ConfigError(f"coefficients {path}: {name} is {value!r}; it must be {words}")
