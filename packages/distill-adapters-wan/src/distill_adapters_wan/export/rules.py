"""What of an export request for a Wan role cannot be had. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from distill_diffusers.export import rules
from distill_diffusers.roles.lora import linear_layers
from distill_protocols import ExportRequest, Problem, RoleSpec, WeightsError

from distill_adapters_wan.architecture import architecture

FORMATS = {
    "diffusers": "a pipeline folder",
    "comfyui": "one file under the model's original names",
    "lora": "low-rank adapters alone",
}


def export_problems(role: RoleSpec, request: ExportRequest) -> Iterator[Problem]:
    """Yield what is wrong with ``request``; see ``distill_diffusers.export.rules``."""
    transformers: Mapping[str, Mapping[str, Any]] = {}
    with suppress(WeightsError):  # reported as a problem of the role's path
        transformers, _ = architecture(role.path)

    def max_rank() -> int | None:
        layers = [linear_layers(config) for config in transformers.values()]
        return max((min(size) for sizes in layers for size in sizes.values()), default=None)

    yield from rules.export_problems(
        role, request, formats=FORMATS, modules=tuple(transformers), max_rank=max_rank
    )
