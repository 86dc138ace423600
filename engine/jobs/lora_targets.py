"""Which layers of a model a training would train, without training."""

from __future__ import annotations

from ..architectures import find_architecture
from ..config import Config
from .network_plan import check, plan_network
from .tool_result import ToolResult


def run(config: Config) -> ToolResult:
    """A table of the layers that the settings of a training select, with ranks and sizes.

    Only the headers of the model file are read.

    Raises:
        EngineError: the file is no model of a family, or the network cannot be made for it.
    """
    config.require("dit")
    assert config.model.dit is not None
    check(config)
    family = find_architecture(config.model.architecture, config.model.dit)
    plan = plan_network(config, family, family.empty_transformer(config.model.dit))
    table = plan.describe(verbose=config.network.arguments.verbose)
    lines = [table, f"{len(plan.layers)} layers of this {family.name} model could be trained"]
    return ToolResult("\n".join([*lines, *plan.remarks]))
