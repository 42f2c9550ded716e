"""What the Wan adapter supports. No torch: run files are checked against it."""

from attrs import evolve
from distill_diffusers import family
from distill_protocols import Capabilities

from distill_adapters_wan.config import WanPipelineConfig

CAPABILITIES = evolve(
    family.CAPABILITIES,
    supports_exits=True,
    supports_flow_maps=True,
    supports_expert_routing=True,
    supports_frame_times=True,
    supports_image_condition=True,
)
"""Without causal roles."""


def capabilities_of(config: WanPipelineConfig) -> Capabilities:
    """Give the capabilities of a run with this ``config``."""
    if config.causal is None:
        return CAPABILITIES
    return evolve(
        CAPABILITIES,
        supports_kv_cache=True,
        supports_teacher_forcing=True,
        causal_roles=config.causal.roles,
    )
