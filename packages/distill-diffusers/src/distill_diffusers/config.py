"""What the section ``pipeline_config`` of every family on diffusers has. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_


@frozen(kw_only=True)
class ClipConfig:
    """The picture or clip that is trained and sampled; a family's own keys are added by
    inheritance.

    Attributes:
        height: pixels; divisible by ``pixel_unit``.
        width: pixels; likewise.
        components: Diffusers folder (or a published hub id) that VAE, text encoders and tokenizers
            come from; default: the path of the first role.
        cfg_batched: guidance in one call of 2B instead of two of B: faster, more memory. In
            training alone; sampling does as the family's pipeline.
    """

    pixel_unit: ClassVar[int] = 16
    """Pixels that a token spans: the VAE's stride times the transformer's patch."""

    height: int = field()
    width: int = field()
    components: str | None = field(default=None, metadata={"path": ()})
    cfg_batched: bool = True

    @height.validator
    @width.validator
    def _check_pixels(self, attribute: Attribute[int], value: int) -> None:
        unit = self.pixel_unit
        if value < unit or value % unit:
            below = max(unit, value // unit * unit)
            raise ValueError(
                f"{value} must be divisible by {unit}, which is what a token of the transformer "
                f"spans in pixels; {below} or {below + unit} would do"
            )


@frozen(kw_only=True)
class ImageConfig(ClipConfig):
    """The keys of every image family."""

    @property
    def num_frames(self) -> int:
        """An image is a clip of one frame."""
        return 1


@frozen(kw_only=True)
class VideoConfig(ClipConfig):
    """The keys of every video family; beside those of ``ClipConfig``:

    Attributes:
        num_frames: frames of a clip, k ``frame_unit`` + 1: the VAE keeps the first and folds each
            further ``frame_unit`` into one latent frame.
        text_encoder_precision: of the text encoder's weights while prompts are encoded (the
            encoder of T5-XXL: 19 GB in fp32; UMT5-XXL: 23 GB; half of it in bf16).
    """

    frame_unit: ClassVar[int] = 4
    """Frames that a latent frame spans, but for the first."""

    num_frames: int = field()
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )

    @num_frames.validator
    def _check_frames(self, attribute: Attribute[int], value: int) -> None:
        unit = self.frame_unit
        if value < 1 or (value - 1) % unit:
            below = max(1, (value - 1) // unit * unit + 1)
            raise ValueError(
                f"{value} must be {unit}k + 1, because the VAE keeps the first frame and folds "
                f"each further {unit} into one latent frame; {below} or {below + unit} would do"
            )
