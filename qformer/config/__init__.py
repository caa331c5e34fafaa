"""Every config: its schema, and how it is read."""

from qformer.config.data import DataConfig, SourceConfig, prompt_problem
from qformer.config.loading import (
    ConfigError,
    from_values,
    load_config,
    model_part,
    named_stage,
    only_model,
    parse_arguments,
    read_config,
    read_section,
    read_values,
    to_yaml,
)
from qformer.config.protocol import Protocol, protocol_options, read_protocol, task_names
from qformer.config.schema import (
    DTYPES,
    ENCODER_LOADERS,
    EncoderConfig,
    LlmConfig,
    ModelPart,
    QFormerConfig,
    RunPart,
    Stage1Config,
    Stage1Part,
    Stage1Section,
    Stage2Config,
    Stage2Part,
    Stage2Section,
)

__all__ = [
    "DTYPES", "ENCODER_LOADERS", "ConfigError", "DataConfig", "EncoderConfig", "LlmConfig", "ModelPart", "Protocol", "QFormerConfig", "RunPart", "SourceConfig", "Stage1Config",
    "Stage1Part", "Stage1Section", "Stage2Config", "Stage2Part", "Stage2Section", "from_values", "load_config", "model_part",
    "named_stage", "only_model", "parse_arguments", "prompt_problem",
    "protocol_options", "read_config", "read_protocol", "read_section", "read_values", "task_names", "to_yaml",
]  # fmt: skip
