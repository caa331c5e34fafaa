"""Every config: its schema, and how it is read."""

from qformer.config.loading import ConfigError, from_dict, load_config, parse_arguments, read_config, to_yaml
from qformer.config.schema import (
    DataConfig,
    EncoderConfig,
    LlmConfig,
    QFormerConfig,
    Stage1Config,
    Stage2Config,
    Stage2Section,
)

__all__ = [
    "ConfigError", "DataConfig", "EncoderConfig", "LlmConfig", "QFormerConfig", "Stage1Config", "Stage2Config",
    "Stage2Section", "from_dict", "load_config", "parse_arguments", "read_config", "to_yaml",
]  # fmt: skip
