"""What the section ``pipeline_config`` of every family on diffusers has. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import attrs
from attrs import Attribute, evolve, field, frozen
from attrs.validators import in_


@frozen(kw_only=True)
class BucketConfig:
    """One of several sizes of clips that a run is trained on.

    Attributes:
        height: pixels.
        width: pixels.
        num_frames: frames; left out: a picture, which is a clip of one frame.
    """

    height: int
    width: int
    num_frames: int = 1

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.height} x {self.width}"


_MISSING = "missing; write the size of the clips, or several under buckets. "
"""Before the rule that 0 breaks, which a size is that nobody wrote."""


@frozen(kw_only=True)
class ClipConfig:
    """The picture or clip that is trained and sampled; a family's own keys are added by
    inheritance.

    Attributes:
        height: pixels; divisible by ``pixel_unit``.
        width: pixels; likewise.
        buckets: several sizes, instead of ``height`` and ``width`` (and ``num_frames``), which are
            then those of the largest: it is validated and planned with.
        components: Diffusers folder (or a published hub id) that VAE, text encoders and tokenizers
            come from; default: the path of the first role.
        cfg_batched: guidance in one call of 2B instead of two of B: faster, more memory. In
            training alone; sampling does as the family's pipeline.
    """

    pixel_unit: ClassVar[int] = 16
    """Pixels that a token spans: the VAE's stride times the transformer's patch."""

    height: int = field(default=0)
    width: int = field(default=0)
    buckets: tuple[BucketConfig, ...] = field(default=())
    components: str | None = field(default=None, metadata={"path": ()})
    cfg_batched: bool = True

    def __attrs_post_init__(self) -> None:
        if self.buckets:
            self._take_size(self.largest_bucket)

    @height.validator
    @width.validator
    def _check_pixels(self, attribute: Attribute[int], value: int) -> None:
        if self._is_of_buckets(attribute, value):
            return
        if problem := self._pixel_problem(value):
            raise ValueError(_MISSING * (value == 0) + problem)

    @buckets.validator
    def _check_buckets(
        self, attribute: Attribute[tuple[BucketConfig, ...]], value: tuple[BucketConfig, ...]
    ) -> None:
        doubled = sorted({str(bucket) for bucket in value if value.count(bucket) > 1})
        problems = [f"{bucket} stands here twice" for bucket in doubled]
        for bucket in value:
            problems += [f"{bucket}: {problem}" for problem in self._bucket_problems(bucket)]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def largest_bucket(self) -> BucketConfig:
        """The one of the most tokens."""
        return max(self.buckets, key=self._cells)

    def of_bucket(self, bucket: BucketConfig) -> Self:
        """Return the same config of clips of one size."""
        return evolve(self, buckets=(), height=bucket.height, width=bucket.width)

    def _take_size(self, bucket: BucketConfig) -> None:
        # Frozen for everybody else; this is still the making of it.
        object.__setattr__(self, "height", bucket.height)
        object.__setattr__(self, "width", bucket.width)

    def _cells(self, bucket: BucketConfig) -> int:
        """Count pixels of latent frames."""
        return bucket.height * bucket.width

    def _bucket_problems(self, bucket: BucketConfig) -> Iterator[str]:
        for name, pixels in (("height", bucket.height), ("width", bucket.width)):
            if problem := self._pixel_problem(pixels):
                yield f"{name} {problem}"

    def _is_of_buckets(self, attribute: Attribute[int], value: int) -> bool:
        """Tell whether a size is that of the buckets, and refuse one beside them.

        The largest one's may be written: a config that was saved and is read again has both.
        """
        if not self.buckets:
            return False
        own = attrs.asdict(self.largest_bucket)[attribute.name]
        if value not in (0, own):
            raise ValueError(
                f"{value} beside buckets, of which the largest has {own}; leave it out"
            )
        return True

    def _pixel_problem(self, value: int) -> str | None:
        unit = self.pixel_unit
        if value >= unit and value % unit == 0:
            return None
        below = max(unit, value // unit * unit)
        return (
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

    def _bucket_problems(self, bucket: BucketConfig) -> Iterator[str]:
        yield from super()._bucket_problems(bucket)
        if bucket.num_frames != 1:
            yield f"num_frames {bucket.num_frames} of an image model; leave it out"


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

    num_frames: int = field(default=0)
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )

    @num_frames.validator
    def _check_frames(self, attribute: Attribute[int], value: int) -> None:
        if self._is_of_buckets(attribute, value):
            return
        if problem := self._frame_problem(value):
            raise ValueError(_MISSING * (value == 0) + problem)

    def of_bucket(self, bucket: BucketConfig) -> Self:
        """Return the same config of clips of one size."""
        return evolve(
            self,
            buckets=(),
            num_frames=bucket.num_frames,
            height=bucket.height,
            width=bucket.width,
        )

    def _take_size(self, bucket: BucketConfig) -> None:
        super()._take_size(bucket)
        object.__setattr__(self, "num_frames", bucket.num_frames)

    def _cells(self, bucket: BucketConfig) -> int:
        latent_frames = (bucket.num_frames - 1) // self.frame_unit + 1
        return latent_frames * super()._cells(bucket)

    def _bucket_problems(self, bucket: BucketConfig) -> Iterator[str]:
        yield from super()._bucket_problems(bucket)
        if problem := self._frame_problem(bucket.num_frames):
            yield f"num_frames {problem}"

    def _frame_problem(self, value: int) -> str | None:
        unit = self.frame_unit
        if value >= 1 and (value - 1) % unit == 0:
            return None
        below = max(1, (value - 1) // unit * unit + 1)
        return (
            f"{value} must be {unit}k + 1, because the VAE keeps the first frame and folds "
            f"each further {unit} into one latent frame; {below} or {below + unit} would do"
        )
