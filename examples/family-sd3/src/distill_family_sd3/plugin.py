"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from distill_protocols import Capabilities, FamilyPlugin, Problem, RoleSpec
from distill_protocols.plugins import EMPTY

from distill_family_sd3.config import SD3PipelineConfig

if TYPE_CHECKING:
    import torch
    from distill_protocols import (
        DistillAdapter,
        Exporter,
        ModelBundle,
        RoleHandle,
        RolePlan,
        WeightSource,
    )


class SD3Family(FamilyPlugin[SD3PipelineConfig]):
    """Stable Diffusion 3 and 3.5. A picture is a clip of one frame."""

    name: ClassVar[str] = "sd3"
    contract: ClassVar[int] = 2
    help: ClassVar[str] = "Stable Diffusion 3 and 3.5, from Diffusers-format folders or hub ids"
    config_class: ClassVar[type] = SD3PipelineConfig

    def capabilities(self, config: SD3PipelineConfig) -> Capabilities:
        return Capabilities(
            supports_cfg=True,
            supports_decode=True,
            supported_pred_types=frozenset({"v", "x0", "eps"}),
        )

    def components(self, config: SD3PipelineConfig) -> str | None:
        return config.components

    def role_problems(self, role: RoleSpec, config: SD3PipelineConfig) -> Iterable[Problem]:
        raise NotImplementedError

    def plan(self, role: RoleSpec, config: SD3PipelineConfig) -> RolePlan:
        raise NotImplementedError

    def load(
        self,
        roles: Sequence[RoleSpec],
        config: SD3PipelineConfig,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        raise NotImplementedError

    def weights(self, path: str) -> Mapping[str, WeightSource]:
        raise NotImplementedError

    def adapter(
        self, bundle: ModelBundle, config: SD3PipelineConfig, *, source: str
    ) -> DistillAdapter:
        raise NotImplementedError

    def exporter(self, config: SD3PipelineConfig, *, source: str) -> Exporter:
        raise NotImplementedError


PLUGIN = SD3Family()
