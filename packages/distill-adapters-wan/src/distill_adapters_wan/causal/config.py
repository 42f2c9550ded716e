"""Which roles are causal, and what their chunks see. No torch: run files are checked against it.

Frames are latent frames; a chunk is what is denoised together. All of a chunk's frames see each
other and the chunks before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_diffusers.model_configs import read_integer, read_integers
from distill_protocols import Chunk
from distill_protocols.validators import at_least


@frozen(kw_only=True)
class CausalConfig:
    """Block-causal attention of some roles; all others stay bidirectional, untouched.

    Attributes:
        roles: names of the causal roles.
        chunk_frames: latent frames that are denoised together (Self-Forcing: 3).
        first_frame_alone: the first latent frame, which holds one frame of pixels and not four, is
            a chunk of its own.
        window_frames: the most that a chunk sees, itself and sink included, so what a rollout
            keeps in memory is bounded whatever the video's length; None: the whole past.
        sink_frames: the first frames of the video, which stay in the window for good.
        sink_positions: moving: when frames between sink and window have left, the sink moves up to
            it: positions are those within the window (Xiao et al. 2024, StreamingLLM, section 3.2),
            and a video may go on for ever. kept: keys keep their first rotation, so the sink falls
            behind (Self-Forcing, LongLive): positions are those in the video, which ends where the
            model's do.
    """

    roles: tuple[str, ...] = field()
    chunk_frames: int = field(
        default=3, validator=at_least(1, "a chunk holds at least one latent frame")
    )
    first_frame_alone: bool = False
    window_frames: int | None = field(
        default=None, validator=optional(at_least(1, "a chunk sees at least itself"))
    )
    sink_frames: int = field(default=0, validator=at_least(0, "it is a number of frames"))

    sink_positions: Literal["moving", "kept"] = field(
        default="moving", validator=in_(("moving", "kept"))
    )

    @roles.validator
    def _check_roles(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value or len(set(value)) != len(value):
            raise ValueError(
                f"{list(value)} must name at least one role, and each once; leave "
                "pipeline_config.causal out if no role is causal"
            )

    @window_frames.validator
    def _check_window(self, attribute: object, value: int | None) -> None:
        if value is None:
            return
        least = self.chunk_frames + self.sink_frames
        if value < least or (value - self.sink_frames) % self.chunk_frames:
            raise ValueError(
                f"{value} must be sink_frames + a multiple of chunk_frames "
                f"({self.sink_frames} + {self.chunk_frames}k, at least {least}): chunks leave the "
                "window whole, as nothing in training shows a part of one"
            )

    @sink_frames.validator
    def _check_sink(self, attribute: object, value: int) -> None:
        if value == 0:
            return
        if self.window_frames is None:
            raise ValueError(
                f"{value} has no effect without window_frames: the whole past stays anyway. Set "
                "window_frames, or leave sink_frames out"
            )
        lead = int(self.first_frame_alone)
        if value < lead or (value - lead) % self.chunk_frames:
            first = "1 + " if lead else ""
            raise ValueError(
                f"{value} must be {first}a multiple of chunk_frames ({self.chunk_frames}), because "
                "chunks stay whole"
            )

    @sink_positions.validator
    def _check_sink_positions(self, attribute: object, value: str) -> None:
        if value == "kept" and self.sink_frames == 0:
            raise ValueError(
                "kept has no effect without sink_frames: of frames in a window only distances "
                "count, which are the same. Set sink_frames, or leave it out"
            )

    # -- what follows from it -----------------------------------------------------------------

    def chunks(self, frames: int) -> tuple[Chunk, ...]:
        """Divide a video of ``frames`` latent frames into chunks; the last one may be shorter."""
        starts = [0, *range(1 if self.first_frame_alone else self.chunk_frames, frames,
                            self.chunk_frames)]  # fmt: skip
        stops = [*starts[1:], frames]
        return tuple(Chunk(a, b - a) for a, b in zip(starts, stops, strict=True))

    def chunk_at(self, first_frame: int) -> Chunk | None:
        """Return the (full) chunk that begins at ``first_frame``; None where none does."""
        lead = int(self.first_frame_alone)
        if first_frame == 0:
            return Chunk(0, 1 if lead else self.chunk_frames)
        begins = first_frame >= lead and (first_frame - lead) % self.chunk_frames == 0
        return Chunk(first_frame, self.chunk_frames) if begins else None

    @property
    def past_frames(self) -> int | None:
        """The most frames that a chunk sees before itself; None: all."""
        return None if self.window_frames is None else self.window_frames - self.chunk_frames

    def past(self, first_frame: int) -> tuple[range, range]:
        """Frames that a chunk at ``first_frame`` sees before itself: (sink, window).

        The sink is empty as long as nothing lies between the two.
        """
        most = self.past_frames
        if most is None or first_frame <= most:
            return range(0), range(first_frame)
        return range(self.sink_frames), range(first_frame - (most - self.sink_frames), first_frame)


def causal_problems(config: CausalConfig, transformer: Mapping[str, object]) -> Iterator[str]:
    """Why a transformer of these numbers cannot be causal so."""
    patch = read_integers(transformer, "patch_size", (1, 2, 2))[0]
    longest = read_integer(transformer, "rope_max_seq_len", 1024)
    if patch != 1:
        yield (
            f"pipeline_config.causal: the transformer folds {patch} latent frames into one token, "
            "and a causal role needs one a token (as all published Wans have), so that chunks can "
            "end at any frame"
        )
    if config.window_frames is not None and config.window_frames > longest:
        yield (
            f"pipeline_config.causal.window_frames {config.window_frames} is more than the "
            f"{longest} positions that the transformer has (rope_max_seq_len); make it smaller"
        )
