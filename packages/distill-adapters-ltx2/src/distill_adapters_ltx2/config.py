"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import Attribute, field, frozen
from distill_diffusers.config import VideoConfig
from distill_protocols.validators import above, at_least, within

from distill_adapters_ltx2.published import PUBLISHED, STRIDE_HW, STRIDE_T

_OFF_AT_ONE = "it multiplies a difference of predictions by scale - 1, so 1 is off; LTX2Pipeline's"


@frozen(kw_only=True)
class LTX2PipelineConfig(VideoConfig):
    """The clip that is trained and sampled, and how the LTX-2 models are called.

    Guidance w of the run file is that of the prompt. The keys ``stg_scale`` to
    ``guidance_rescale`` add LTX-2's other parts to every guided call (w other than 0 and 1); a call
    with w = 1, a student's, is plain.

    Beside the keys of ``VideoConfig`` (8k + 1 frames; height and width divisible by 32):

    Attributes:
        audio: whether clips have sound. Latents are then two tensors, ``video`` and ``audio``.
            Otherwise the transformer is called with its two halves isolated, as Lightricks' trainer
            does for data without sound: nothing of the sound's half is read or trained.
        audio_weight: what the mean loss of the sound counts beside that of the pictures; 1 in
            Lightricks' trainer.
        frame_rate: frames per second, which positions and the length of the sound follow from. Use
            the frame rate of the data set, also for sampling.
        max_sequence_length: number of tokens that a prompt is padded or cut to, a multiple of the
            connectors' registers (128). It must equal the data set's.
        stg_scale: s of skip-block guidance (STG, Hyung et al. 2024), ``s (x - x_skipped)``, where
            the blocks ``stg_blocks`` leave out their self-attention. 0 switches it off;
            LTX2Pipeline's default is 1.
        stg_blocks: these blocks, counted from 0.
        modality_scale: m of modality guidance, ``(m - 1) (x - x_isolated)``, where pictures and
            sound do not see each other. 1 switches it off; LTX2Pipeline's default is 3. Only with
            ``audio``.
        guidance_rescale: phi of Lin et al. 2024 (section 3.4), which scales guided clean latents to
            the standard deviation of the conditional ones. 0 switches it off; LTX2Pipeline's
            default is 0.7.
        audio_guidance: w of the sound in guided calls; left out, the pictures' own. LTX2Pipeline's
            default is 7.
    """

    pixel_unit = STRIDE_HW
    frame_unit = STRIDE_T

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    audio: bool = False
    audio_weight: float = field(
        default=1.0, validator=at_least(0, "it is what the sound's loss counts; 1 is customary")
    )
    frame_rate: float = field(
        default=24.0, validator=above(0, "it is the number of frames per second; 24 to 30 is usual")
    )
    max_sequence_length: int = field(
        default=1024, validator=at_least(1, "a prompt has at least the token that begins it")
    )
    stg_scale: float = field(
        default=0.0, validator=at_least(0, "it moves away from a call without a block; 0 is off")
    )
    stg_blocks: tuple[int, ...] = field(default=(28,))
    modality_scale: float = field(default=1.0, validator=at_least(1, f"{_OFF_AT_ONE} is 3"))
    guidance_rescale: float = field(
        default=0.0,
        validator=within(
            0, 1, "it mixes the guided prediction (0) with the rescaled one (1); 0.7 is customary"
        ),
    )
    audio_guidance: float | None = field(default=None)

    @stg_blocks.validator
    def _check_blocks(self, _attribute: object, value: tuple[int, ...]) -> None:
        if self.stg_scale > 0 and (not value or min(value) < 0):
            raise ValueError(
                f"{list(value)} must be numbers of blocks, from 0, where stg_scale is above 0. "
                "Name one, such as 28, or use stg_scale: 0"
            )

    @audio_weight.validator
    @modality_scale.validator
    @audio_guidance.validator
    def _check_audio(self, attribute: Attribute[float], value: float | None) -> None:
        if not self.audio and value != attribute.default:
            raise ValueError(
                f"{value} has no effect without sound. Set audio: true, or leave it out"
            )

    @audio_guidance.validator
    def _check_guidance(self, attribute: object, value: float | None) -> None:
        if value is not None and not value >= 0:
            raise ValueError(f"{value} must not be below 0, which leads away from the prompt")
