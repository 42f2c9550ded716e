"""The section ``preprocess`` of a file. No torch here: files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_, optional
from distill_media import CaptionsConfig, CutConfig, SourceConfig
from distill_protocols.validators import at_least


def _not_empty(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{value!r} must name a file or folder")


@frozen(kw_only=True)
class PreprocessConfig:
    """Which clips and captions become data, and how.

    Attributes:
        output_dir: folder of the data set; a folder that was begun with the same section goes on.
        sources: folders, tables, tars and lists of prompts; a list of prompts alone becomes a data
            set of captions alone.
        run_file: a run file that the data are for: its recipe, models, conditioning and
            pipeline_config are those of this file where it has none.
        captions: what is done to captions.
        clips: how clips are cut; their size is that of pipeline_config.
        first_frames: store what an image-to-video model reads of each clip's first frame; default:
            where the model cannot do without.
        latent_dtype: of the stored latents.
        batch_size: clips that the VAE encodes together.
        items_per_unit: videos, pictures or prompts in a unit of work. A killed process loses at
            most what it has of one.
        shard_bytes: a file is written once it holds so much; until then it is in memory.
        cache: folder in which encoded captions are kept, for other data sets of the same encoder.
        device: ``auto``: the accelerator, if there is one.
        decode_workers: threads that decode ahead of the VAE.
        decode_ahead: passes that they may be ahead; each holds up to four clips of a video.
        cpu_threads: threads of torch on the CPU; None: as torch chooses.
    """

    output_dir: str = field(validator=_not_empty, metadata={"path": ()})
    sources: tuple[SourceConfig, ...] = field()
    run_file: str | None = field(default=None, validator=_not_empty, metadata={"path": ()})
    captions: CaptionsConfig = field(factory=CaptionsConfig)
    clips: CutConfig = field(factory=CutConfig)
    first_frames: bool | None = None
    latent_dtype: Literal["float16", "bfloat16", "float32"] = field(
        default="float16", validator=in_(("float16", "bfloat16", "float32"))
    )
    batch_size: int = field(default=1, validator=at_least(1, "clips are encoded alone or together"))
    items_per_unit: int = field(default=32, validator=at_least(1, "a unit holds an item"))
    shard_bytes: int = field(
        default=256 * 2**20, validator=at_least(1, "a file holds a sample; 268435456 is usual")
    )
    cache: str | None = field(default=None, validator=_not_empty, metadata={"path": ()})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", validator=in_(("auto", "cpu", "cuda"))
    )
    decode_workers: int = field(default=2, validator=at_least(1, "somebody decodes"))
    decode_ahead: int = field(default=4, validator=at_least(1, "the next clip is decoded ahead"))
    cpu_threads: int | None = field(
        default=None, validator=optional(at_least(1, "leave it out for torch's choice"))
    )

    @sources.validator
    def _check_sources(
        self, attribute: Attribute[tuple[SourceConfig, ...]], value: tuple[SourceConfig, ...]
    ) -> None:
        if not value:
            raise ValueError("[] names no source; write one, such as - folder: ../clips")
        for kind, is_one in (
            ("prompts", [source.prompts is not None for source in value]),
            ("latents", [source.latents is not None for source in value]),
        ):
            if any(is_one) and not all(is_one):
                raise ValueError(
                    f"{kind} stand beside others; all samples of a data set have latents, or none "
                    "has, and all are encoded by the same parts. Make two data sets"
                )

    @property
    def captions_alone(self) -> bool:
        """Whether there are prompts without clips."""
        return self.sources[0].prompts is not None

    @property
    def encoded_already(self) -> bool:
        """Whether latents and text embeddings are taken as they are."""
        return self.sources[0].latents is not None
