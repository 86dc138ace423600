"""Every setting, once: name, type, range, default and help.

Frozen models, grouped by subject; on the surface (files, command line, nodes) the names are flat,
so each is used in one group only. The reader, the command line, the documentation and the nodes
take everything from here. Only jobs read a `Config`; below them values are passed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import ConfigError
from .drawing import GenerateConfig
from .group import Group
from .inputs import DatasetConfig, ModelConfig
from .learning import LossConfig, OptimizerConfig, TimestepConfig
from .magcache import MagCacheConfig
from .metadata import MetadataConfig
from .network import NetworkArguments, NetworkConfig
from .quantization import QuantizationConfig
from .running import (
    LoggingConfig,
    OutputConfig,
    RuntimeConfig,
    SamplesConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "FIELDS",
    "GROUPS",
    "GROUP_OF",
    "Config",
    "DatasetConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LossConfig",
    "MagCacheConfig",
    "MetadataConfig",
    "ModelConfig",
    "NetworkArguments",
    "NetworkConfig",
    "OptimizerConfig",
    "OutputConfig",
    "QuantizationConfig",
    "RuntimeConfig",
    "SamplesConfig",
    "TimestepConfig",
    "TrainingConfig",
    "ValidationConfig",
]


class Config(BaseModel):
    """All settings of all jobs; each job needs only some of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    timesteps: TimestepConfig = TimestepConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    output: OutputConfig = OutputConfig()
    metadata: MetadataConfig = MetadataConfig()
    logging: LoggingConfig = LoggingConfig()
    generate: GenerateConfig = GenerateConfig()
    magcache: MagCacheConfig = MagCacheConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def require(self, *names: str) -> None:
        """Check that settings without a default are given.

        Raises:
            ConfigError: names all that are missing, with what they are.
        """
        missing = [name for name in names if self.value(name) is None]
        if missing:
            lines = [f"  {name}: {FIELDS[name].description}" for name in missing]
            raise ConfigError(
                f"{len(missing)} needed setting{'s are' if len(missing) > 1 else ' is'} missing; "
                f"give {'them' if len(missing) > 1 else 'it'} in the config file or as "
                f"{' '.join(f'--{name} ...' for name in missing)}\n" + "\n".join(lines)
            )

    def value(self, name: str) -> Any:
        """A setting by its flat name."""
        return getattr(getattr(self, GROUP_OF[name]), name)


GROUPS: dict[str, type[Group]] = {
    name: group.annotation  # pyright: ignore[reportAssignmentType]
    for name, group in Config.model_fields.items()
}
# Flat name of every setting -> the group it is in, and its declaration.
GROUP_OF = {name: key for key, group in GROUPS.items() for name in group.model_fields}
FIELDS = {name: GROUPS[key].model_fields[name] for name, key in GROUP_OF.items()}
