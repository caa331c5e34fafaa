"""Every config: its schema, and how it is read."""

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
from qformer.config.schema import (
    DTYPES,
    ENCODER_LOADERS,
    DataConfig,
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
    prompt_problem,
)

__all__ = [
    "DTYPES", "ENCODER_LOADERS", "ConfigError", "DataConfig", "EncoderConfig", "LlmConfig", "ModelPart", "QFormerConfig", "RunPart", "Stage1Config",
    "Stage1Part", "Stage1Section", "Stage2Config", "Stage2Part", "Stage2Section", "from_values", "load_config", "model_part",
    "named_stage", "only_model", "parse_arguments", "prompt_problem", "read_config", "read_section", "read_values", "to_yaml",
]  # fmt: skip
