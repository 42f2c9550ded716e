"""The files of a validation, and pictures of several. Letters: N prompts, K frames that are shown.

::

    validation/
      iteration-000200/
        validation.json     iteration, fps, prompts; by view: role, sampler, folder, files ...
        sheet.png           a row for each view
        x0/                 000.mp4 ...: what roles predict, a row for each t
        <view>/             000.mp4 ... (000.png of a picture), frames.png: K frames of each clip
      kept/<role>-<key>/    clips of a frozen view, made once and named by every validation.json
      over_time/<view>.png  a row for each validation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from attrs import asdict, frozen
from distill_media import (
    Mp4Writer,
    SheetRow,
    draw_sheet_film,
    enlarge,
    shrink,
    spread_frames,
    write_contact_sheet,
    write_mp4,
)
from distill_protocols import DataError, LatentParts, Latents, SamplerSpec, TensorInfo, one_tensor
from distill_runtime import (
    UnreadableFileError,
    as_count,
    json_text,
    path_inside,
    read_json_object,
    replace_folder,
    write_safetensors,
)
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

RECORD = "validation.json"
SHEET = "sheet.png"
FRAMES = "frames.png"
LATENTS = "latents.safetensors"
PREDICTIONS = "x0"
KEPT, KEPT_RECORD = "kept", "kept.json"
OVER_TIME = "over_time"
SMALLEST_SIDE = 128
"""Pixels; smaller clips are enlarged by a whole factor, or people could not see them."""
FRAMES_SHOWN = 3
LONGEST_SIDE = 320
"""Pixels of a frame in a picture, at most."""
_COLUMNS = 6
"""Prompts beside each other in a picture."""
_ROWS = 12
"""Validations in a picture over time; of more of them, so many, evenly spread."""
_UNREADABLE = (
    UnreadableFileError, OSError, KeyError, TypeError, ValueError, SyntaxError,
    Image.DecompressionBombError,
)  # fmt: skip
"""What reading a damaged record or picture raises."""


@frozen(kw_only=True, eq=False)
class ShownView:
    """One view of a validation, as its files and pictures show it.

    Attributes:
        sampler: None: not known.
        folder: of its clips, relative to ``validation/``.
        files: one a prompt.
        frames: [N, K, H, W, 3] uint8, for pictures.
        is_frozen: its weights never move, so that its clips are always these.
    """

    name: str
    role: str
    ema: bool
    sampler: SamplerSpec | None
    folder: str
    files: tuple[str, ...]
    frames: np.ndarray
    is_frozen: bool

    def row(self) -> SheetRow:
        """Return its row of a contact sheet."""
        calls = "" if self.sampler is None else f"\n{self.sampler.calls_per_clip} calls"
        return SheetRow(f"{self.name}{calls}{' (EMA)' if self.ema else ''}", self.frames)

    def record(self) -> dict[str, object]:
        """Return what ``validation.json`` says of it."""
        return {
            "role": self.role,
            "ema": self.ema,
            "sampler": None if self.sampler is None else asdict(self.sampler),
            "folder": self.folder,
            "files": list(self.files),
            "frames": self.frames.shape[1],
        }


def choose_frames(clips: np.ndarray) -> np.ndarray:
    """Return the frames of clips [N, T, H, W, 3] that pictures show, [N, K, h, w, 3]."""
    return shrink(clips[:, spread_frames(clips.shape[1], FRAMES_SHOWN)], LONGEST_SIDE)


def write_clips(folder: Path, clips: np.ndarray, fps: float) -> tuple[str, ...]:
    """Write clips [N, T, H, W, 3] uint8 and their ``frames.png``; return the clips' names."""
    names = []
    for number, clip in enumerate(clips):
        names.append(f"{number:03d}.{'png' if len(clip) == 1 else 'mp4'}")
        if len(clip) == 1:
            Image.fromarray(enlarge(clip[0], SMALLEST_SIDE)).save(folder / names[-1])
        else:
            # Not write_mp4: the folder itself appears whole or not at all.
            with Mp4Writer(folder / names[-1], fps=fps, smallest_side=SMALLEST_SIDE) as video:
                video.add(clip)
    frames = choose_frames(clips)
    n, k, h, w, _ = frames.shape
    grid = frames.transpose(0, 2, 1, 3, 4).reshape(n * h, k * w, 3)
    Image.fromarray(grid).save(folder / FRAMES)
    return tuple(names)


def read_frames(folder: Path, prompts: int, frames: int) -> np.ndarray:
    """Read what ``write_clips`` wrote for pictures, [N, K, H, W, 3].

    Raises:
        OSError: it is not there, or no picture.
        ValueError: it is one of other clips.
    """
    with Image.open(folder / FRAMES, formats=("PNG",)) as file:
        grid = np.asarray(file.convert("RGB"))
    height, width = grid.shape[:2]
    if height % prompts or width % frames:
        raise ValueError(f"{folder / FRAMES} is none of {prompts} clips of {frames} frames")
    cells = grid.reshape(prompts, height // prompts, frames, width // frames, 3)
    return cells.transpose(0, 2, 1, 3, 4)


def write_kept(folder: Path, clips: np.ndarray, fps: float, latents: Latents | None) -> None:
    """Write clips of a view that is sampled once, whole or not at all.

    Args:
        latents: [N, C, T, H, W] that the clips are decoded from, where they are needed again.
    """
    with replace_folder(folder, only_writer=True) as stage:
        files = write_clips(stage, clips, fps)
        shown = len(spread_frames(clips.shape[1], FRAMES_SHOWN))
        (stage / KEPT_RECORD).write_text(json_text({"files": files, "frames": shown}))
        if latents is not None:
            named = {"latents": latents}
            if isinstance(latents, LatentParts):  # numbered, as a file does not keep their order
                parts = enumerate(latents.tensors.items())
                named = {f"latents.{i}.{part}": tensor for i, (part, tensor) in parts}
            kept = {name: one_tensor(one).float().contiguous().cpu() for name, one in named.items()}
            infos = {name: TensorInfo(tuple(one.shape), one.dtype) for name, one in kept.items()}
            write_safetensors(stage / LATENTS, infos, kept.__getitem__)


def read_latents(folder: Path, rows: Sequence[int]) -> Latents:
    """Read kept latents of some prompts, [len(rows), C, T, H, W].

    Raises:
        DataError: they are not there, or damaged.
    """
    try:
        kept, index = load_file(folder / LATENTS), list(rows)
        if "latents" in kept:
            return kept["latents"][index]
        places = sorted(kept, key=lambda name: int(name.split(".")[1]))
        return LatentParts({name.split(".", 2)[2]: kept[name][index] for name in places})
    except (OSError, SafetensorError, KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{folder / LATENTS} cannot be read ({error}); what roles predict is shown of these "
            "clips. Remove the folder, and they are made anew"
        ) from error


def read_kept(folder: Path, prompts: int) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Read names of kept clips and their frames for pictures; None: they must be made (again)."""
    try:
        record = read_json_object(folder / KEPT_RECORD)
        files = tuple(str(name) for name in cast("list[object]", record["files"]))
        frames = read_frames(folder, prompts, as_count(record["frames"], least=1))
        whole = len(files) == prompts and all(
            path_inside(folder, name, folder / KEPT_RECORD).is_file() for name in files
        )
    except _UNREADABLE:
        return None
    return (files, frames) if whole else None


def write_record(
    folder: Path,
    iteration: int,
    fps: float,
    prompts: Sequence[str],
    views: Sequence[ShownView],
    more: Mapping[str, object],
) -> None:
    """Write ``validation.json`` and, where there are views, ``sheet.png``.

    Args:
        more: further entries of the record.
    """
    record = {
        "iteration": iteration,
        "fps": fps,
        "prompts": list(prompts),
        "views": {view.name: view.record() for view in views},
        **more,
    }
    (folder / RECORD).write_text(json_text(record))
    if views:
        rows = [view.row() for view in views]
        write_contact_sheet(
            rows, prompts, folder / SHEET, frames_shown=FRAMES_SHOWN, columns=_COLUMNS
        )


def write_predictions(
    folder: Path,
    prompts: Sequence[str],
    columns: Sequence[str],
    clips: Mapping[float, np.ndarray],
    fps: float,
) -> dict[str, np.ndarray]:
    """Write a film for each prompt, a row for each t; return them by name, [T, H, W, 3] uint8.

    Args:
        clips: by t, [N, columns, T, H, W, 3] uint8.
    """
    folder.mkdir()
    films: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(prompts):
        rows = [SheetRow(f"t = {t:g}", own[number]) for t, own in clips.items()]
        film = draw_sheet_film(rows, columns, frame_side=96, title=prompt)
        name = f"{number:03d}.{'png' if len(film) == 1 else 'mp4'}"
        if len(film) == 1:
            Image.fromarray(film[0]).save(folder / name)
        else:
            write_mp4(film, folder / name, fps=fps, smallest_side=1)
        films[name] = film
    return films


def write_over_time(root: Path, prompts: Sequence[str], views: Sequence[ShownView]) -> None:
    """Write for each view that moves one picture of all its validations of these prompts up to
    now: first the frozen views, then a row for each validation.

    Args:
        root: ``validation/``.
        views: of the newest validation, whose folder is there.
    """
    reference = [view.row() for view in views if view.is_frozen]
    for view in views:
        if view.is_frozen:
            continue
        newest = iteration_of(Path(view.folder).parent.name)
        folders = [folder for number, folder in _validations(root) if number <= newest]
        rows = [row for folder in folders if (row := _row_of(folder, view.name, prompts))]
        chosen = [rows[n] for n in spread_frames(len(rows), _ROWS)]
        path = root / OVER_TIME / f"{view.name}.png"
        write_contact_sheet(
            [*reference, *chosen], prompts, path, frames_shown=FRAMES_SHOWN, columns=_COLUMNS
        )


def iteration_of(folder: str) -> int:
    """Return the iteration of a folder's name; -1: it is none of a validation."""
    number = folder.removeprefix("iteration-")
    return int(number) if number != folder and number.isascii() and number.isdigit() else -1


def _validations(root: Path) -> Iterator[tuple[int, Path]]:
    numbered = [(iteration_of(path.name), path) for path in root.iterdir()]
    yield from sorted((number, path) for number, path in numbered if number >= 0)


def _row_of(folder: Path, view: str, prompts: Sequence[str]) -> SheetRow | None:
    """Return the row of a former validation; None: it has none, or one of other prompts."""
    try:
        record = read_json_object(folder / RECORD)
        if record["prompts"] != list(prompts):
            return None
        own = cast("Mapping[str, Mapping[str, object]]", record["views"])[view]
        clips = path_inside(folder.parent, own["folder"], folder / RECORD)
        frames = read_frames(clips, len(prompts), as_count(own["frames"], least=1))
    except _UNREADABLE:
        return None  # one of an earlier release, or damaged: the picture shows the others
    return SheetRow(f"{iteration_of(folder.name):,}", frames)
