"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_diffusers.config import ImageConfig
from distill_protocols.validators import within

from distill_family_sd3.models import PUBLISHED


@frozen(kw_only=True)
class SD3PipelineConfig(ImageConfig):
    """The picture that is trained and sampled; beside the keys of ``ImageConfig``:

    Attributes:
        max_sequence_length: tokens that a prompt is padded or cut to for T5; those for CLIP are
            always 77. SD 3 attends the padding, so this must be the data set's.
            ``StableDiffusion3Pipeline`` uses 256 and takes 512 at most.
        components: as in ``ImageConfig``, or a published hub id.
    """

    max_sequence_length: int = field(
        default=256, validator=within(1, 512, "StableDiffusion3Pipeline takes no other lengths")
    )
    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
