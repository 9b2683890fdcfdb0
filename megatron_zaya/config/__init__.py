"""The one configuration tree of a run: strict pydantic sections, YAML with dotted overrides, JSON Schema.

Importing this package imports no torch, so that a mistake in a run file is reported in a second.
"""

from megatron_zaya.config.errors import ConfigError
from megatron_zaya.config.load import dump_config, json_schema, load_config
from megatron_zaya.config.run_config import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_config", "json_schema", "load_config"]
