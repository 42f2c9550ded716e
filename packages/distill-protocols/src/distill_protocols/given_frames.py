"""Frames of a clip that a condition gives, so that they are not made: how many a model reads.

Frames are counted in pixels. No torch here: run files are checked by it.
"""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from distill_protocols.validators import at_least

Need = Literal["never", "optional", "always"]
"""Whether a model reads something: not at all, where it is there, or not without it."""


@frozen(kw_only=True)
class GivenFrames:
    """How many frames of a clip are given.

    Attributes:
        first: at its beginning: 0 for text alone, 1 for image to video, more for a continuation.
        last: whether its last frame is given too.
    """

    first: int = field(default=0, validator=at_least(0, "it counts frames"))
    last: bool = False

    def __bool__(self) -> bool:
        return self.first > 0 or self.last


@frozen(kw_only=True)
class FrameConditions:
    """Which frames of a clip a model can be given.

    Attributes:
        first: whether it reads the first frame.
        several: whether it reads further frames after the first, to go on from them.
        last: whether it reads the last frame beside the first.
        frames_a_latent: frames that its VAE makes one latent frame of, after the first: given ones
            fill latent frames, so their number is ``1 + k * frames_a_latent``.
    """

    first: Need = "never"
    several: bool = False
    last: Need = "never"
    frames_a_latent: int = 1

    @property
    def least(self) -> GivenFrames:
        """The frames that the model cannot do without."""
        return GivenFrames(first=int(self.first == "always"), last=self.last == "always")

    def problem(self, given: GivenFrames, frames: int | None = None) -> str | None:
        """Say why ``given`` frames cannot be given; None: they can.

        Args:
            frames: of the whole clip; None: not known.
        """
        if given and self.first == "never":
            return (
                "frames of a clip are given, and the model reads text alone; they would have no "
                "effect. Leave them out, or use an image-to-video model"
            )
        if given.first == 0 and (self.first == "always" or given.last):
            return (
                "no first frame is given, and the model makes clips that begin with one. Give it "
                "the first frame of each clip"
            )
        if given.last and self.last == "never":
            return (
                "a last frame is given, and the model reads first ones alone; it would have no "
                "effect. Leave it out, or use a model of first and last frames"
            )
        if self.last == "always" and not given.last:
            return (
                "no last frame is given, and the model makes clips between a first and a last one. "
                "Give it the last frame of each clip, too"
            )
        return self._count_problem(given, frames)

    def _count_problem(self, given: GivenFrames, frames: int | None) -> str | None:
        if given.first > 1 and not self.several:
            return (
                f"{given.first} first frames are given, and the model reads one. Give it one, or "
                "use a model that goes on from several"
            )
        if given.first > 1 and (given.first - 1) % self.frames_a_latent:
            return (
                f"{given.first} first frames are given, and there must be "
                f"{self.frames_a_latent}k + 1: the VAE folds {self.frames_a_latent} frames into "
                "one after the first, and a latent frame is given as a whole or not at all"
            )
        if given and frames is not None and given.first + given.last >= frames:
            return (
                f"{given.first} first frames{' and the last one' if given.last else ''} are given "
                f"of clips of {frames}, which leaves nothing to be made. Give fewer"
            )
        return None
