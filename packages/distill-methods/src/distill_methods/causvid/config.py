"""Options of CausVid. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import frozen

from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.roles import STUDENT


@frozen(kw_only=True)
class CausVidConfig(MatchingConfig):
    """CausVid (Yin et al. 2025, "From Slow Bidirectional to Fast Autoregressive Video Diffusion
    Models").

    Attributes:
        clean_chunks: a chunk may also be drawn clean, as one more level beside the sampler's (as
            in CausVid's code, whose list of steps ends with 0): it is then the data itself, from
            which nothing is learned, and shows its followers the past that sampling will show
            them.
    """

    clean_chunks: bool = True

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return (*super().capabilities, "supports_frame_times", f"causal:{STUDENT.name}")
