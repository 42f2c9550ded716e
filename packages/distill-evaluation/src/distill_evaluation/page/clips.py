"""The clips of a run: which there are, and their bytes for the page."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import define, field, frozen
from distill_media import Animation, MediaError, encode_mp4, read_animation, shrink
from distill_runtime import (
    UnreadableFileError,
    as_text,
    path_inside,
    read_json,
    read_json_object,
)
from PIL import Image

from distill_evaluation.page.runs import MOST_BYTES, RunFolder

MOST_PROMPTS = 64
"""Rows of clips of one run."""
MOST_ITERATIONS = 400
MOST_VIEWS = 24
SMALLEST_SIDE = 128
"""Smaller clips are enlarged by a whole factor before they are encoded, or colours would blur."""
LONGEST_SIDE = 480
MOST_FRAMES = 240
"""Of a clip on the page; of longer ones every so many frames."""
KEEP_BYTES = 400_000
"""An MP4 of at most so many bytes is embedded as it is."""
_CRF = 20


@frozen
class ClipPlace:
    """Where a clip is: a file, or a column of one that shows several side by side.

    Attributes:
        column: place among ``columns``.
        gap: pixels behind each column.
    """

    path: Path
    column: int = 0
    columns: int = 1
    gap: int = 0


@frozen(kw_only=True)
class FilmStrip:
    """A view's clips of one prompt over time, the oldest first."""

    view: str
    clips: Mapping[int, ClipPlace]


@frozen(kw_only=True)
class PromptClips:
    """All clips of one prompt.

    Attributes:
        finals: of the report, by entry.
        frozen: of views that do not change, by view.
        strips: of views that do.
        predicted: iteration and film of what the roles predicted in the newest validation that
            shows it.
    """

    prompt: str
    finals: Mapping[str, ClipPlace] = field(factory=dict)
    frozen: Mapping[str, ClipPlace] = field(factory=dict)
    strips: tuple[FilmStrip, ...] = ()
    predicted: tuple[int, ClipPlace] | None = None


def find_clips(run: RunFolder) -> list[PromptClips]:
    """List the clips of a run by prompt: those of its report, then those of its validations."""
    rows = [*_report_clips(run), *_validation_clips(run)]
    if len(rows) > MOST_PROMPTS:
        run.problems.append(f"clips of {MOST_PROMPTS} of {len(rows):,} prompts are shown")
    return rows[:MOST_PROMPTS]


# -- the report -----------------------------------------------------------------------------------


def _report_clips(run: RunFolder) -> Iterator[PromptClips]:
    clips = run.report.clips if run.report is not None else None
    if not isinstance(clips, dict):
        return
    prompts, entries = clips.get("prompts"), clips.get("entries")
    if not isinstance(prompts, list) or not isinstance(entries, dict):
        run.problems.append("report.json: its clips cannot be read")
        return
    for number, prompt in enumerate(prompts[: MOST_PROMPTS + 1]):
        finals = {}
        for name, entry in list(entries.items())[:MOST_VIEWS]:
            with contextlib.suppress(ValueError, TypeError, IndexError, AttributeError, KeyError):
                finals[name] = ClipPlace(_file_of(run.folder, entry, number))
        yield PromptClips(prompt=str(prompt), finals=finals)


def _file_of(base: Path, entry: Mapping[str, object], number: int) -> Path:
    """Return file ``number`` of what JSON calls ``{"folder": ..., "files": [...]}`` below ``base``.

    ValueError, IndexError or TypeError: it is not there, or lies elsewhere.
    """
    files = entry["files"]
    if not isinstance(files, list):
        raise TypeError("files is no list")
    try:
        folder = path_inside(base, entry["folder"], "folder")
        path = path_inside(folder, files[number], "files")
    except UnreadableFileError as error:
        raise ValueError(str(error)) from error
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return path


# -- validations ----------------------------------------------------------------------------------


@define(eq=False)
class _Validation:
    """Clips of one validation: by prompt, by view."""

    iteration: int
    prompts: Sequence[str]
    views: dict[str, Sequence[ClipPlace | None]] = field(factory=dict)
    predictions: Sequence[ClipPlace | None] = ()


def _validation_clips(run: RunFolder) -> Iterator[PromptClips]:
    validations = list(_read_validations(run))
    if not validations:
        return
    prompts = list(dict.fromkeys(p for v in validations for p in v.prompts))
    views = list(dict.fromkeys(view for v in validations for view in v.views))[:MOST_VIEWS]
    for prompt in prompts:
        still, strips = {}, []
        for view in views:
            places: dict[int, ClipPlace] = {}
            for validation in validations:
                found = dict(zip(validation.prompts, validation.views.get(view, ()), strict=False))
                place = found.get(prompt)
                if place is not None:
                    places[validation.iteration] = place
            if places and (_are_kept(run, places) or _are_equal(places)):
                still[view] = next(iter(places.values()))
            elif places:
                strips.append(FilmStrip(view=view, clips=places))
        yield PromptClips(
            prompt=prompt,
            frozen=still,
            strips=tuple(strips),
            predicted=_newest_predictions(validations, prompt),
        )


def _newest_predictions(
    validations: Sequence[_Validation], prompt: str
) -> tuple[int, ClipPlace] | None:
    for validation in reversed(validations):
        found = dict(zip(validation.prompts, validation.predictions, strict=False)).get(prompt)
        if found is not None:
            return validation.iteration, found
    return None


def _are_kept(run: RunFolder, places: Mapping[int, ClipPlace]) -> bool:
    """Return whether validations only name clips that are kept apart from them."""
    kept = run.folder / "validation" / "kept"
    return all(place.path.is_relative_to(kept) for place in places.values())


def _are_equal(places: Mapping[int, ClipPlace]) -> bool:
    """Return whether clips of several validations show the same: files of equal bytes."""
    paths = {place.path for place in places.values()}
    if len(places) == 1:
        return False
    sizes = {path.stat().st_size for path in paths}
    if len(sizes) > 1 or next(iter(sizes)) > MOST_BYTES:
        return False
    return len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) == 1


def _read_validations(run: RunFolder) -> Iterator[_Validation]:
    base = run.folder / "validation"
    try:
        folders = {
            int(match[1]): path
            for path in base.iterdir()
            if (match := re.fullmatch(r"iteration-(\d{6,12})", path.name))
        }
    except OSError:
        return
    for iteration in sorted(folders)[-MOST_ITERATIONS:]:
        folder = folders[iteration]
        try:
            if (folder / "validation.json").exists():
                yield _read_validation(base, folder, iteration)
            elif (folder / "prompts.json").exists():
                yield _read_old_validation(folder, iteration)
        except (UnreadableFileError, ValueError, TypeError, KeyError, OSError) as error:
            run.problems.append(f"{folder.name} of validation cannot be read: {error}")


def _read_validation(base: Path, folder: Path, iteration: int) -> _Validation:
    content = read_json_object(folder / "validation.json", max_bytes=MOST_BYTES)
    prompts, views = content.get("prompts"), content.get("views")
    if not isinstance(prompts, list) or not isinstance(views, dict):
        raise ValueError("validation.json has no prompts or no views")
    validation = _Validation(iteration, [as_text(prompt) for prompt in prompts[:MOST_PROMPTS]])
    for name, view in list(views.items())[:MOST_VIEWS]:
        validation.views[name] = _places_of(base, view, len(validation.prompts))
    if "x0" in content:
        validation.predictions = _places_of(base, content["x0"], len(validation.prompts))
    return validation


def _places_of(base: Path, entry: object, count: int) -> list[ClipPlace | None]:
    """Return the clip of each prompt; None where it is not there."""
    places: list[ClipPlace | None] = []
    for number in range(count):
        try:
            places.append(ClipPlace(_file_of(base, entry, number)))  # type: ignore[arg-type]
        except (ValueError, TypeError, IndexError, KeyError):
            places.append(None)
    return places


def _read_old_validation(folder: Path, iteration: int) -> _Validation:
    """Read a validation of an earlier release: a GIF a view, a column a prompt."""
    prompts = read_json(folder / "prompts.json", max_bytes=MOST_BYTES)
    if not isinstance(prompts, list):
        raise ValueError("prompts.json is no list")
    texts = [as_text(prompt) for prompt in prompts[:MOST_PROMPTS]]
    validation = _Validation(iteration, texts)
    for path in sorted(folder.glob("*.gif"))[:MOST_VIEWS]:
        count = len(prompts)
        validation.views[path.stem] = [ClipPlace(path, n, count, 2) for n in range(len(texts))]
    return validation


# -- bytes ----------------------------------------------------------------------------------------


@frozen(eq=False, kw_only=True)
class EmbeddedClip:
    """A clip as it is in the page.

    Attributes:
        video: MP4; empty for a still picture.
        poster: WebP of its first frame.
        width: of the picture as stored, in pixels; ``height`` likewise.
    """

    video: bytes
    poster: bytes
    width: int
    height: int
    seconds: float

    @property
    def size(self) -> int:
        """Bytes that it takes in the page, in base64."""
        return (len(self.video) + len(self.poster)) * 4 // 3 + 200

    @property
    def video_uri(self) -> str:
        """The video as a ``data:`` address."""
        return f"data:video/mp4;base64,{base64.b64encode(self.video).decode()}"

    @property
    def poster_uri(self) -> str:
        """The first frame as a ``data:`` address."""
        return f"data:image/webp;base64,{base64.b64encode(self.poster).decode()}"


@define(eq=False)
class ClipStore:
    """Clips that were made ready for a page; those whose file has not changed since are kept for
    the next one."""

    _clips: dict[tuple[ClipPlace, int, int], EmbeddedClip | None] = field(factory=dict)
    _read: dict[Path, Animation] = field(factory=dict)

    def embed(self, places: Iterable[ClipPlace], budget: int) -> dict[ClipPlace, EmbeddedClip]:
        """Make clips ready, the first ones first, until ``budget`` bytes are used up.

        Clips that cannot be read are left out too.
        """
        ready: dict[ClipPlace, EmbeddedClip] = {}
        used: set[tuple[ClipPlace, int, int]] = set()
        for place in dict.fromkeys(places):
            try:
                status = place.path.stat()
            except OSError:
                continue
            key = (place, status.st_mtime_ns, status.st_size)
            if key not in self._clips:
                self._clips[key] = self._make(place)
            used.add(key)
            clip = self._clips[key]
            if clip is None:
                continue
            if clip.size > budget:
                break
            budget -= clip.size
            ready[place] = clip
        self._read.clear()
        self._clips = {key: clip for key, clip in self._clips.items() if key in used}
        return ready

    def _make(self, place: ClipPlace) -> EmbeddedClip | None:
        try:
            kept = _kept_as_it_is(place)
            return kept or _encode(_cut_out(self._animation(place.path), place))
        except (MediaError, OSError, ValueError):
            return None

    def _animation(self, path: Path) -> Animation:
        # Columns of one file come after each other.
        if path not in self._read:
            self._read.clear()
            self._read[path] = read_animation(path)
        return self._read[path]


def _kept_as_it_is(place: ClipPlace) -> EmbeddedClip | None:
    path = place.path
    if path.suffix.lower() != ".mp4" or place.columns > 1 or path.stat().st_size > KEEP_BYTES:
        return None
    video = path.read_bytes()
    if video[4:8] != b"ftyp":
        return None
    first = read_animation(path, most_frames=1)
    height, width = first.frames.shape[1:3]
    if max(height, width) > 2 * LONGEST_SIDE:
        return None
    return EmbeddedClip(
        video=video, poster=_webp(first.frames[0]), width=width, height=height, seconds=0.0
    )


def _cut_out(animation: Animation, place: ClipPlace) -> Animation:
    frames = animation.frames
    pitch, rest = divmod(frames.shape[2], place.columns)
    if place.columns > 1 and rest == 0 and pitch > place.gap:
        left = place.column * pitch
        frames = frames[:, :, left : left + pitch - place.gap]
    return Animation(frames=frames, fps=animation.fps)


def _encode(animation: Animation) -> EmbeddedClip:
    step = -(-len(animation.frames) // MOST_FRAMES)
    frames = shrink(animation.frames[::step], LONGEST_SIDE)
    height, width = frames.shape[1:3]
    scale = max(1, -(-SMALLEST_SIDE // min(height, width)))
    fps = animation.fps / step
    moves = len(frames) > 1
    video = encode_mp4(frames, fps=fps, smallest_side=SMALLEST_SIDE, crf=_CRF) if moves else b""
    return EmbeddedClip(
        video=video,
        poster=_webp(np.repeat(np.repeat(frames[0], scale, 0), scale, 1)),
        width=width * scale,
        height=height * scale,
        seconds=len(frames) / fps,
    )


def _webp(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
