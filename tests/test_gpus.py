"""GPUs: figures agree with each other, names are found in the ways people write them."""

from __future__ import annotations

import pytest
from dsv4.errors import ConfigError
from dsv4.gpus import GPUS, gpu


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_in_bytes_and_flops_and_plausible(name: str) -> None:
    g = GPUS[name]
    assert g.name == name and g.source
    assert 80e9 < g.memory_bytes < 300e9 and 3e12 < g.hbm_bytes_per_s < 9e12
    assert g.fp8_flops == 2 * g.bf16_flops
    assert 0.5 < g.copy_share <= 1


@pytest.mark.parametrize(
    ("written", "name"),
    [("B200", "b200"), ("NVIDIA H100 80GB HBM3", "h100"), ("h200-sxm", "h200"), ("NVIDIA GB200", "gb200")],
)
def test_names_as_people_and_drivers_write_them(written: str, name: str) -> None:
    assert gpu(written) is GPUS[name]


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"gpu is 'b20'; known are h100, .*did you mean 'b200'\?"):
        gpu("b20")
