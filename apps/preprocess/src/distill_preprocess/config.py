"""The section ``preprocess`` of a file. No torch here: files are checked without it."""

from __future__ import annotations

import itertools
from typing import Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_, optional
from distill_media import CaptionsConfig, CutConfig, SourceConfig
from distill_protocols.validators import at_least


def _not_empty(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{value!r} must name a file or folder")


def _falls(_config: object, _attribute: object, value: tuple[float, ...]) -> None:
    falling = all(a > b for a, b in itertools.pairwise(value))
    if not falling or not all(0 < time <= 1000 for time in value):
        raise ValueError(
            f"{list(value)} must fall strictly, from at most 1000 (noise) to above 0; the clip "
            "itself, at 0, is always the last state of a pair and not named"
        )


@frozen(kw_only=True)
class OdePairsConfig:
    """ODE pairs of CausVid, Self-Forcing or FastVideo: prompts, and states of a teacher's sampling.

    Attributes:
        path: a folder of .pt files, one such file, an LMDB (``distill-preprocess[lmdb]``), or
            FastVideo's parquet of ODE trajectories.
        times: levels t of the states, falling and without the clip itself at 0. CausVid's script
            stores 1000, 756.76 and 521.74, Self-Forcing's 1000, 960, 888.89 and 727.27, and
            neither records them. FastVideo's parquet does: these are taken of them. Empty where
            there are clips alone.
    """

    path: str = field(validator=_not_empty, metadata={"path": ()})
    times: tuple[float, ...] = field(default=(), validator=_falls)


@frozen(kw_only=True)
class PreprocessConfig:
    """Which clips and captions become data, and how.

    Attributes:
        output_dir: folder of the data set; a folder that was begun with the same section goes on.
        sources: folders, tables, tars and lists of prompts; a list of prompts alone becomes a data
            set of captions alone.
        ode_pairs: instead of them, a teacher's trajectories that another code has stored.
        run_file: a run file that the data are for: its recipe, models, conditioning and
            pipeline_config are those of this file where it has none.
        captions: what is done to captions.
        clips: how clips are cut; their size is that of pipeline_config.
        first_frames: store what an image-to-video model reads of each clip's first frame; or a
            number: of so many first frames, for a model that goes on from them. Default: where the
            model cannot do without.
        last_frame: store what a model reads of each clip's last frame, beside the first; default:
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
    sources: tuple[SourceConfig, ...] = field(default=())
    ode_pairs: OdePairsConfig | None = field(default=None)
    run_file: str | None = field(default=None, validator=_not_empty, metadata={"path": ()})
    captions: CaptionsConfig = field(factory=CaptionsConfig)
    clips: CutConfig = field(factory=CutConfig)
    first_frames: bool | int | None = field(default=None)
    last_frame: bool | None = None
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

    @first_frames.validator
    def _check_first_frames(
        self, attribute: Attribute[bool | int | None], value: bool | int | None
    ) -> None:
        if value is not None and value is not False and value < 1:
            raise ValueError(f"{value} counts frames, at least 1. Write false for none")

    @sources.validator
    def _check_sources(
        self, attribute: Attribute[tuple[SourceConfig, ...]], value: tuple[SourceConfig, ...]
    ) -> None:
        for kind, is_one in (
            ("prompts", [source.prompts is not None for source in value]),
            ("latents", [source.latents is not None for source in value]),
        ):
            if any(is_one) and not all(is_one):
                raise ValueError(
                    f"{kind} stand beside others; all samples of a data set have latents, or none "
                    "has, and all are encoded by the same parts. Make two data sets"
                )

    @ode_pairs.validator
    def _check_pairs(
        self, attribute: Attribute[OdePairsConfig | None], value: OdePairsConfig | None
    ) -> None:
        if (value is None) == (not self.sources):
            raise ValueError(
                f"{'ode_pairs stands beside' if self.sources else 'there is no ode_pairs, and no'} "
                "sources; one of the two says what becomes data. Write sources: [{folder: "
                "../clips}], say"
            )

    @property
    def captions_alone(self) -> bool:
        """Whether there are prompts without clips."""
        return self.ode_pairs is None and self.sources[0].prompts is not None

    @property
    def encoded_already(self) -> bool:
        """Whether latents and text embeddings are taken as they are."""
        return self.ode_pairs is None and self.sources[0].latents is not None

    @property
    def has_clips(self) -> bool:
        """Whether videos and pictures are decoded."""
        return self.ode_pairs is None and not (self.captions_alone or self.encoded_already)
