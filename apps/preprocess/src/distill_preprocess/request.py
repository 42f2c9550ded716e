"""From a file to a checked request, or to every problem of the file at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import evolve
from distill_media import ClipShape, CutConfig
from distill_protocols import Problem
from distill_runfile import ComponentsConfig, read_components

from distill_preprocess.config import PreprocessConfig

SECTION = "preprocess"

Request = ComponentsConfig[PreprocessConfig]


def read_request(file: Path) -> Request:
    """Read and check ``file``.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    return read_components(file, SECTION, PreprocessConfig, _problems, base_key="run_file")


def buckets_of(config: Request) -> tuple[ClipShape, ...]:
    """Return the shapes of clips that the models of the request take."""
    return tuple(ClipShape(*shape) for shape in config.family_plugin.clip_shapes(config.pipeline))


def cut_of(config: Request) -> CutConfig:
    """Return how clips are cut, with the model's rate where the file names none."""
    cut = config.section.clips
    if cut.fps is not None:
        return cut
    return evolve(cut, fps=config.family_plugin.frame_rate(config.pipeline, source=_path(config)))


def needs_first_frames(config: Request) -> bool:
    """Tell whether what a model reads of a first frame is stored."""
    own = config.section
    if own.captions_alone or own.encoded_already:
        return False
    if own.first_frames is not None:
        return own.first_frames
    family, pipeline = config.family_plugin, config.pipeline
    return any(family.needs_image(role.spec, pipeline) for role in config.roles.values())


def stored_text_of(config: Request) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape [L, D] of the one condition tensor that stored text can be; None:
    models of the request read others."""
    family, pipeline = config.family_plugin, config.pipeline
    shapes = family.condition_shapes(pipeline, source=_path(config))
    rows = [(name, shape) for name, shape in shapes.items() if len(shape) == 2]
    return rows[0] if len(shapes) == len(rows) == 1 else None


def _stored_problems(config: Request) -> Iterator[Problem]:
    if stored_text_of(config) is None:
        yield Problem(
            (SECTION, "sources", "0", "latents"),
            "FastVideo's files have text embeddings alone, and the models of this request read "
            "more (masks, first frames). Encode the videos themselves",
        )
    if config.section.first_frames:
        yield Problem(
            (SECTION, "first_frames"), "there are no frames in files of latents. Leave it out"
        )


def _path(config: Request) -> str:
    return next(iter(config.roles.values())).spec.path


def _problems(config: Request) -> Iterator[Problem]:
    own = config.section
    if Path(own.output_dir).is_file():
        yield Problem(
            (SECTION, "output_dir"),
            f"{own.output_dir} is a file; shards become many, in a folder of their own",
        )
    for number, source in enumerate(own.sources):
        for kind, path in (
            ("folder", source.folder),
            ("table", source.table),
            ("tars", source.tars),
            ("latents", source.latents),
            ("prompts", source.prompts),
        ):
            where = (SECTION, "sources", str(number), kind)
            if path is not None and not Path(path).exists():
                yield Problem(where, f"there is no {path}. Name what is there, or copy it here")
            elif path is not None and Path(path) == Path(own.output_dir):
                yield Problem(
                    (SECTION, "output_dir"),
                    f"{path} is a source; latents go into a folder of their own",
                )
    if own.encoded_already:
        yield from _stored_problems(config)
    if own.captions_alone or own.encoded_already:
        return
    if not buckets_of(config):
        yield Problem(
            ("recipe", "family"),
            f"{config.recipe.family!r} does not say of which size its clips are, so none can be "
            "cut. Encode them with distill_conditioning.preprocess",
        )
    elif cut_of(config).fps is None and max(shape.frames for shape in buckets_of(config)) > 1:
        yield Problem(
            (SECTION, "clips"),
            f"family {config.recipe.family!r} does not say how many frames a second its models "
            "were trained on. Write fps: 16, say, or fps: keep",
        )
    if own.clips.scene_cuts is not None and not Path(own.clips.scene_cuts).is_file():
        yield Problem(
            (SECTION, "clips", "scene_cuts"),
            f"there is no file {own.clips.scene_cuts}. Leave it out if nobody has looked for cuts",
        )
