"""The Stable Diffusion 3 family: SD 3 medium, SD 3.5 medium and SD 3.5 large."""

from distill_family_sd3.config import SD3PipelineConfig
from distill_family_sd3.published import PUBLISHED

__all__ = ["PUBLISHED", "SD3PipelineConfig"]
