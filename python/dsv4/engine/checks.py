"""What can be known of the settings before anything slow: torch is not imported here, and of the weights only headers are
read, in about a second for Flash."""

from __future__ import annotations

from dsv4 import requirements
from dsv4._core import Core
from dsv4.config import EngineConfig, core_options
from dsv4.engine.costs import parse_costs
from dsv4.engine.kv_events import KvEventsConfig
from dsv4.engine.rank_count import check_ranks
from dsv4.engine.routing import Tenants
from dsv4.model.config import ModelConfig
from dsv4.model.layout import block_size
from dsv4.model.source import Source, find_source
from dsv4.model.survey import Survey, survey, without_files


def check(config: EngineConfig) -> tuple[Source, Survey]:
    """Where the model is and what its files hold. Raises ConfigError and CheckpointError for packages, settings and files with
    which no engine can start."""
    requirements.check()
    parse_costs(config.cost_model)
    Tenants(config.tenants)
    KvEventsConfig.of(config.kv_events_config)
    dummy = config.load_format == "dummy"
    source = find_source(config.model, config.revision, weights=None if dummy else True)
    model = ModelConfig.from_dir(source.path).first(config.num_layers)
    found = without_files(model, config.seed) if dummy else survey(source.path, model)
    check_ranks(config, found)
    # What `auto` means depends on the device; what is wrong with a block size or a policy does not.
    rows, index = (
        "bfloat16" if name == "auto" else name for name in (config.kv_cache_dtype, config.index_cache_dtype)
    )
    block = block_size(found.config.layers, config.block_size, config.tensor_parallel_size or 1)
    layout = found.config.layout(rows, index, block_tokens=block)
    limits = {
        "pages": 1 + layout.snapshot_pages,
        "slabs": 1,
        "max_step_tokens": 1,
        "max_len": layout.block_tokens,
    }
    Core(layout, core_options(config) | limits)
    return source, found
