"""Where clips and captions are, and how clips are cut. No heavy import here: files are checked
without PyAV and numpy."""

from __future__ import annotations

import math
from typing import Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_, optional
from distill_protocols.validators import at_least

SOURCE_KINDS = ("folder", "table", "tars", "latents", "prompts")


def _is_named(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{value!r} must name a file or folder, or be left out")


@frozen(kw_only=True)
class SourceConfig:
    """Where clips and captions are; exactly one of the first five keys is written.

    Attributes:
        folder: of clips and pictures, searched with all folders below it; the caption of
            ``a.mp4`` is in ``a.txt`` beside it.
        table: .csv, .tsv, .jsonl, .json or .parquet; a row is a clip.
        tars: WebDataset's: one .tar, or a folder of them. Members of one key are one clip.
        latents: FastVideo's parquet files: a folder, searched with all folders below it. Latents,
            text embeddings and what an image-to-video model reads are taken as they are.
        prompts: a text file of one prompt a line, without clips.
        name: begins the ids of its items; needed where two sources have items of one name.
        root: folder that relative paths in ``table`` begin from; default: the table's own.
        media: column of the clip's path; default: the first of video, path, file_name, media,
            file, image, video_path that is there.
        caption: columns (or keys of a tar's .json) of captions, each a caption of its own;
            default: the first of prompt, caption, text, captions.
        caption_suffix: of the files beside clips.
        caption_lines: each line of such a file is a caption of its own, rather than the whole
            text one.
    """

    folder: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    table: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    tars: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    latents: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    prompts: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    name: str | None = field(default=None)
    root: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    media: str | None = None
    caption: tuple[str, ...] = ()
    caption_suffix: str = field(default=".txt")
    caption_lines: bool = False

    @prompts.validator
    def _check_kind(self, attribute: Attribute[str | None], value: str | None) -> None:
        values = (self.folder, self.table, self.tars, self.latents, value)
        written = [kind for kind, v in zip(SOURCE_KINDS, values, strict=True) if v is not None]
        if len(written) != 1:
            raise ValueError(
                f"{' and '.join(written) or 'none'} of {', '.join(SOURCE_KINDS)} is written, and "
                "a source is exactly one of them. Write an entry of the list for each"
            )

    @name.validator
    def _check_name(self, attribute: Attribute[str | None], value: str | None) -> None:
        if value is not None and (not value or not value.isprintable() or "/" in value):
            raise ValueError(f"{value!r} begins ids: it must be printable, not empty, without /")

    @root.validator
    def _check_root(self, attribute: Attribute[str | None], value: str | None) -> None:
        if value is not None and self.table is None:
            raise ValueError("root is where the paths of a table begin; without table leave it out")

    @caption_suffix.validator
    def _check_suffix(self, attribute: Attribute[str], value: str) -> None:
        if not value.startswith(".") or "/" in value or len(value) < 2:
            raise ValueError(f"{value!r} must be the end of a file name, such as .txt")


@frozen(kw_only=True)
class CaptionsConfig:
    """What is done to captions.

    Attributes:
        prefix: put before every caption as it is, such as a trigger word and a space.
        missing: of a clip without a caption: it is left out (``skip``), it has the empty caption
            (``empty``), or nothing is made (``error``).
    """

    prefix: str = ""
    missing: Literal["skip", "empty", "error"] = field(
        default="skip", validator=in_(("skip", "empty", "error"))
    )


def _check_rate(_config: object, _attribute: object, value: float | str) -> None:
    if value != "keep" and (
        isinstance(value, str) or not math.isfinite(value) or not 0 < value <= 1000
    ):
        raise ValueError(
            f"{value!r} must be a number of frames a second, or keep for the frames as they are"
        )


@frozen(kw_only=True)
class CutConfig:
    """How clips of a bucket's length and size are cut out of a video.

    Attributes:
        fps: frames a second that the model was trained on (Wan 2.1: 16; Wan 2.2 TI2V-5B and LTX:
            24). Other rates are resampled by time: of each moment the nearest frame. ``keep``:
            every frame, whatever its time. None stands for the model's rate, which this package
            does not know, and is taken as ``keep``.
        take: ``head``: the first clip of a video; ``uniform``: ``count`` clips, evenly spread from
            its beginning to its end; ``windows``: one after the other, each ``stride`` frames
            after the last one.
        count: of ``uniform``, and the most that ``windows`` takes of one video.
        stride: frames at ``fps`` between the beginnings of ``windows``; default: a clip's length.
        crop: which part of a picture that is too wide or too high is kept: the middle, or one that
            follows from ``seed`` and the clip's id.
        seed: of ``crop: random``.
        crop_bars: cut off black bars above and below, or at both sides, before a clip is scaled. A
            bar is what is black in each of nine frames, spread over the part that is used; they are
            decoded for it, so that a video takes some longer.
        upscale: take videos that are smaller than every bucket, and enlarge them. What is not
            sharp teaches blur.
        scene_cuts: a .json file, {id: [seconds, ...]}: no clip goes over one of these moments.
        max_pixels: of one frame; a larger one is refused before memory is taken for it.
    """

    fps: float | Literal["keep"] | None = field(default=None, validator=optional(_check_rate))
    take: Literal["head", "uniform", "windows"] = field(
        default="head", validator=in_(("head", "uniform", "windows"))
    )
    count: int | None = field(
        default=None, validator=optional(at_least(1, "a video gives a clip or more"))
    )
    stride: int | None = field(
        default=None, validator=optional(at_least(1, "each clip begins later than the last one"))
    )
    crop: Literal["center", "random"] = field(default="center", validator=in_(("center", "random")))
    seed: int = 0
    crop_bars: bool = False
    upscale: bool = False
    scene_cuts: str | None = field(default=None, validator=_is_named, metadata={"path": ()})
    max_pixels: int = field(
        default=50_000_000, validator=at_least(1, "a frame has pixels; 8K video has 33 million")
    )

    @count.validator
    def _check_count(self, attribute: Attribute[int | None], value: int | None) -> None:
        if (self.take == "uniform") != (value is not None) and self.take != "windows":
            raise ValueError(
                f"{value} with take: {self.take}; uniform needs the number of clips a video, and "
                "head takes one. Write take: uniform and count: 4, say"
            )

    @stride.validator
    def _check_stride(self, attribute: Attribute[int | None], value: int | None) -> None:
        if value is not None and self.take != "windows":
            raise ValueError(f"{value} has no effect with take: {self.take}. Write take: windows")
