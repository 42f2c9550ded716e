"""What the section ``pipeline_config`` of every image family has. No torch here."""

from __future__ import annotations

from typing import ClassVar

from attrs import Attribute, field, frozen


@frozen(kw_only=True)
class ImageConfig:
    """The image that is trained and sampled; a family's own keys are added by inheritance.

    Attributes:
        height: pixels; divisible by ``pixel_unit``.
        width: pixels; likewise.
        components: Diffusers folder that VAE, text encoders and tokenizers come from; default: the
            path of the first role.
        cfg_batched: guidance in one call of 2B instead of two of B: faster, more memory. In
            training alone; sampling does as the family's pipeline.
    """

    pixel_unit: ClassVar[int] = 16
    """Pixels that a token spans: the VAE's stride times the transformer's patch."""

    height: int = field()
    width: int = field()
    components: str | None = field(default=None, metadata={"path": ()})
    cfg_batched: bool = True

    @property
    def num_frames(self) -> int:
        """An image is a clip of one frame."""
        return 1

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
