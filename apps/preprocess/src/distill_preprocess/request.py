"""From a file to a checked request, or to every problem of the file at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import evolve
from distill_conditioning import SampleShape
from distill_media import (
    CaptionsConfig,
    ClipShape,
    CutConfig,
    MediaItem,
    read_items,
    read_scene_cuts,
)
from distill_protocols import FrameConditions, GivenFrames, Problem
from distill_runfile import ComponentsConfig, read_components

from distill_preprocess.config import OdePairsConfig, PreprocessConfig

SECTION = "preprocess"

Request = ComponentsConfig[PreprocessConfig]


def read_request(file: Path) -> Request:
    """Read and check ``file``.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    return read_components(file, SECTION, PreprocessConfig, _problems, base_key="run_file")


def items_of(config: Request) -> list[MediaItem]:
    """List what becomes samples, in an order that does not change.

    Raises:
        DataError: a source cannot be read as a whole.
    """
    own = config.section
    if own.ode_pairs is None:
        return read_items(own.sources, own.captions)
    from distill_preprocess.pairs import open_pairs  # torch

    return list(open_pairs(own.ode_pairs).items())


def buckets_of(config: Request) -> tuple[ClipShape, ...]:
    """Return the shapes of clips that the models of the request take."""
    return tuple(ClipShape(*shape) for shape in config.family_plugin.clip_shapes(config.pipeline))


def cut_of(config: Request) -> CutConfig:
    """Return how clips are cut, with the model's rate where the file names none."""
    cut = config.section.clips
    if cut.fps is not None:
        return cut
    return evolve(cut, fps=config.family_plugin.frame_rate(config.pipeline, source=_path(config)))


def scene_cuts_of(config: Request) -> Mapping[str, Sequence[float]]:
    """Read the list of scene cuts, where there is one."""
    file = config.section.clips.scene_cuts
    return {} if file is None else read_scene_cuts(Path(file))


def given_frames_of(config: Request) -> GivenFrames:
    """Return the frames of each clip whose tensors are stored with it, to be given to a model."""
    own = config.section
    if not own.has_clips:
        return GivenFrames()
    least = [readable.least for readable in _readable_frames(config)]
    first = max((one.first for one in least), default=0)
    last = any(one.last for one in least)
    return GivenFrames(
        first=first if own.first_frames is None else int(own.first_frames),
        last=last if own.last_frame is None else own.last_frame,
    )


def _readable_frames(config: Request) -> list[FrameConditions]:
    family, pipeline = config.family_plugin, config.pipeline
    return [family.frame_conditions(role.spec, pipeline) for role in config.roles.values()]


def _given_problems(config: Request) -> Iterator[Problem]:
    """Report frames that are to be given and that a model cannot be given, or cannot do without."""
    given = given_frames_of(config)
    key = "last_frame" if config.section.first_frames is None else "first_frames"
    shortest = min((shape.frames for shape in buckets_of(config)), default=None)
    for readable in _readable_frames(config):
        if (problem := readable.problem(given, shortest)) is not None:
            yield Problem((SECTION, key), problem)
            return


def stored_conditions_of(config: Request) -> Mapping[str, str] | None:
    """Return which condition tensor each tensor of samples that are encoded already is; None:
    models of the request read others."""
    family, pipeline, source = config.family_plugin, config.pipeline, _path(config)
    names = family.foreign_conditions(pipeline, source=source)
    needed = family.condition_shapes(pipeline, source=source)
    return names if names and set(needed) <= set(names.values()) else None


def stored_shapes_of(config: Request) -> tuple[SampleShape, ...]:
    """Return the shapes that samples which are encoded already may have: one a size of clips."""
    family, pipeline, source = config.family_plugin, config.pipeline, _path(config)
    sizes = [family.config_of_clip(pipeline, clip) for clip in family.clip_shapes(pipeline)]
    return tuple(
        SampleShape(
            latents=family.latent_shape(size, source=config.source),
            conditions=family.condition_shapes(size, source=source),
        )
        for size in sizes
    )


def _stored_problems(config: Request) -> Iterator[Problem]:
    if stored_conditions_of(config) is None:
        yield Problem(
            (SECTION, "sources", "0", "latents"),
            "FastVideo's files have text embeddings and what Wan reads of a first frame, and the "
            "models of this request read more or other parts. Encode the videos themselves",
        )
    for key, value in (
        ("first_frames", config.section.first_frames),
        ("last_frame", config.section.last_frame),
    ):
        if value:
            yield Problem((SECTION, key), "there are no frames in files of latents. Leave it out")


def _pair_problems(config: Request, pairs: OdePairsConfig) -> Iterator[Problem]:
    where = (SECTION, "ode_pairs", "path")
    if not Path(pairs.path).exists():
        yield Problem(where, f"there is no {pairs.path}. Name what is there, or copy it here")
    elif Path(pairs.path) == Path(config.section.output_dir):
        yield Problem(
            (SECTION, "output_dir"),
            f"{pairs.path} is where the pairs are; the data set goes into a folder of its own",
        )
    if config.section.captions != CaptionsConfig():
        yield Problem(
            (SECTION, "captions"),
            "the states of a pair belong to its prompt as it was, and to no other. Leave it out",
        )
    own = config.section
    needs_frames = any(readable.least for readable in _readable_frames(config))
    if needs_frames or own.first_frames or own.last_frame:
        yield Problem(
            (SECTION, "ode_pairs"),
            "pairs hold prompts and states, and no first frames, which are asked for (by the "
            "models or first_frames). Use text-to-video models, or make trajectories of pictures "
            "with apps/trajectories",
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
    if own.ode_pairs is not None:
        yield from _pair_problems(config, own.ode_pairs)
    if not own.has_clips:
        return
    yield from _given_problems(config)
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
