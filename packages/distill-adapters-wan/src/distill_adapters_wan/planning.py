"""Sizes of modules that need not exist: built on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import LoraSpec, ModulePlan, WeightsError

from distill_adapters_wan.lora import adapter_parameters


def plan_modules(
    transformers: Mapping[str, Mapping[str, Any]], lora: LoraSpec | None = None
) -> tuple[ModulePlan, ...]:
    """One plan a transformer; the keys are module names, the values their configurations."""
    return tuple(plan_module(name, config, lora) for name, config in transformers.items())


def plan_module(name: str, config: Mapping[str, Any], lora: LoraSpec | None = None) -> ModulePlan:
    """Counts of one transformer, and of the adapters that ``lora`` adds.

    Raises:
        WeightsError: the configuration builds no Wan transformer.
    """
    try:
        with torch.device("meta"):
            module: Any = WanTransformer3DModel.from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{name}: its configuration builds no WanTransformer3DModel ({error}); it belongs to "
            "another model"
        ) from error
    facts = module.config
    width = facts.num_attention_heads * facts.attention_head_dim
    return ModulePlan(
        name=name,
        architecture=f"WanTransformer3DModel, {facts.num_layers} layers of width {width}",
        parameters=sum(p.numel() for p in module.parameters()),
        buffers=sum(b.numel() for b in module.buffers()),
        adapters=0 if lora is None else adapter_parameters(dict(facts), lora),
    )
