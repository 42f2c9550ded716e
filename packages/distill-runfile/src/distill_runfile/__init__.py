"""Reads the YAML file of a run: typed sections, all problems with their lines, and a plan.

Names are imported on first use: ``--help`` needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

if TYPE_CHECKING:
    from distill_runfile.chain import Stage, find_chain
    from distill_runfile.plan import RunPlan, describe, export_warnings, horizon, horizons, plan_run
    from distill_runfile.problems import LocatedProblem
    from distill_runfile.read import (
        read_components,
        read_config,
        read_models,
        read_sampled,
        world_size_of,
    )
    from distill_runfile.schema import (
        ComponentsConfig,
        FamilyConfig,
        InitFromConfig,
        ModelsConfig,
        RecipeConfig,
        Role,
        RoleConfig,
        RunConfig,
        SampledConfig,
    )
    from distill_runfile.source import read_source
    from distill_runfile.structure import to_plain

_LAZY = {
    **dict.fromkeys(["Stage", "find_chain"], "chain"),
    **dict.fromkeys(
        ["RunPlan", "describe", "export_warnings", "horizon", "horizons", "plan_run"], "plan"
    ),
    "LocatedProblem": "problems",
    **dict.fromkeys(
        ["read_components", "read_config", "read_models", "read_sampled", "world_size_of"], "read"
    ),
    **dict.fromkeys(
        ["ComponentsConfig", "FamilyConfig", "InitFromConfig", "ModelsConfig", "RecipeConfig",
         "Role", "RoleConfig", "RunConfig", "SampledConfig"],
        "schema",
    ),
    "read_source": "source",
    "to_plain": "structure",
}  # fmt: skip

__all__ = [
    "ComponentsConfig",
    "FamilyConfig",
    "InitFromConfig",
    "LocatedProblem",
    "ModelsConfig",
    "RecipeConfig",
    "Role",
    "RoleConfig",
    "RunConfig",
    "RunPlan",
    "SampledConfig",
    "Stage",
    "describe",
    "export_warnings",
    "find_chain",
    "horizon",
    "horizons",
    "plan_run",
    "read_components",
    "read_config",
    "read_models",
    "read_sampled",
    "read_source",
    "to_plain",
    "world_size_of",
]

__getattr__ = lazy_exports(__name__, _LAZY)
