"""How a causal role is called: chunk by chunk, each seeing what came before it. No torch here.

Frames are latent frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen

from distill_protocols.validators import at_least

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Chunk:
    """Frames that a causal role denoises together: ``first .. first + frames - 1`` of a video."""

    first: int
    frames: int

    @property
    def stop(self) -> int:
        """The frame after the last."""
        return self.first + self.frames

    @property
    def span(self) -> slice:
        """For a clip [B, C, T, H, W]: ``clip[:, :, chunk.span]``."""
        return slice(self.first, self.stop)


@frozen(kw_only=True)
class ChunkCall:
    """``caches`` of a model call on one chunk: what it is, and whether it becomes past.

    The call sees the chunk itself and the past, which is what earlier calls stored, detached. It
    changes the past only if ``store`` is set. Guidance keeps one past a condition.

    Attributes:
        first_frame: place of the chunk's first frame in the video; the past must end just there.
        store: keep this call's keys and values for the chunks to come, detached. The frames should
            then be as clean as later chunks shall see them, and t theirs.
        stream: name of the past that is meant. Two videos in the making have two.
        after_gap: frames between the past's end and this chunk have left the window already, and
            are not part of the past any more.
    """

    ROLLOUT: ClassVar[str] = "rollout"

    first_frame: int = field(validator=at_least(0, "frames of a video count from 0"))
    store: bool = False
    stream: str = ROLLOUT
    after_gap: bool = False


@frozen(kw_only=True, eq=False)
class CleanPast:
    """``caches`` of a call on a whole clip whose chunks each see a clean past (teacher forcing).

    Chunk i of ``x_t`` sees itself and the chunks before it of ``latents``, never those of ``x_t``:
    one call of twice the length, equal to a rollout that stores ``latents`` chunk by chunk.

    Attributes:
        latents: what is past [B, C, T, H, W], of the shape of ``x_t``.
        t: how noisy ``latents`` are: [B] or [B, T]; None: not at all, t = 0.
    """

    latents: Tensor
    t: Tensor | None = None

    def repeated(self, times: int) -> CleanPast:
        """Return the same rows ``times`` after each other."""
        return CleanPast(
            latents=self.latents.repeat(times, 1, 1, 1, 1),
            t=None if self.t is None else self.t.repeat(times, *[1] * (self.t.dim() - 1)),
        )
