"""Options of CausVid. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import frozen
from distill_protocols import ONE_TENSOR, ExitSpec

from distill_methods.distribution_matching.config import MatchingConfig
from distill_methods.roles import STUDENT


@frozen(kw_only=True)
class CausVidConfig(MatchingConfig):
    """CausVid (Yin et al. 2025, "From Slow Bidirectional to Fast Autoregressive Video Diffusion
    Models").

    Attributes:
        clean_chunks: t = 0 is one more level beside the sampler's that a chunk may be drawn at (as
            in CausVid's code, whose list of steps ends with 0). Such a chunk is the data itself:
            nothing is learned from it, but later chunks see a clean past, as in sampling.
    """

    clean_chunks: bool = True

    @property
    def trained_exits(self) -> int:
        """See ``MatchingConfig.trained_exits``; clean chunks are one more kind."""
        return super().trained_exits + self.clean_chunks

    @property
    def told_exits(self) -> ExitSpec | None:
        """See ``MatchingConfig.told_exits``: of each chunk, one more of clean ones."""
        told = super().told_exits
        return told and ExitSpec(count=told.count + self.clean_chunks, by_frame=True)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return (*super().capabilities, ONE_TENSOR, "supports_frame_times", f"causal:{STUDENT.name}")
