"""Samples as files for people to watch: mp4 clips and a contact sheet.

Clips are `[3, T, H, W]` or `[N, 3, T, H, W]`, in [0, 1]. Small clips are enlarged with hard pixel
edges: an interpolated 32-pixel digit looks blurred, and blur is just what the reader is asked to
judge.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import attrs
import av
import numpy as np
from distill_runtime import replace_file
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK = (20, 20, 20)
_PAPER = (250, 250, 250)
_FONT_SIZE = 18
# Without mbtree: x264's look-ahead for it reads memory that nobody wrote, so that equal frames
# became other files now and then.
_X264 = {"crf": "12", "mbtree": "0"}


def write_mp4(clip: Tensor, path: Path | str, *, fps: float = 8, smallest_side: int = 256) -> None:
    """Write one clip `[3, T, H, W]` as H.264.

    Each pixel is enlarged by the smallest whole factor that reaches `smallest_side` pixels.
    ValueError for another shape.
    """
    _check_clip(clip)
    with (
        replace_file(path) as staging,
        Mp4Writer(staging, fps=fps, smallest_side=smallest_side) as video,
    ):
        video.add(clip)


class Mp4Writer:
    """An H.264 file that is written as frames come; complete at the end of its `with` block.

    On one machine, equal frames give equal bytes.

    Args:
        path: of the file.
        fps: frames per second.
        smallest_side: each pixel is enlarged by the smallest whole factor that reaches it.
    """

    def __init__(self, path: Path | str, *, fps: float, smallest_side: int = 1) -> None:
        self._container = av.open(str(path), "w")
        self._fps = Fraction(fps).limit_denominator(1000)
        self._smallest_side = smallest_side
        self._stream: av.VideoStream | None = None

    def add(self, clip: Tensor) -> None:
        """Append frames `[3, T, H, W]` in [0, 1], of the size of those before.

        ValueError for another shape.
        """
        frames = _to_uint8(_check_clip(clip))
        scale = max(1, -(-self._smallest_side // min(frames.shape[1:3])))
        self.add_pixels(_pad_to_even(frames.repeat(scale, 1).repeat(scale, 2)))

    def add_pixels(self, frames: np.ndarray) -> None:
        """Append frames `[T, H, W, 3]` uint8 with even sides, as they are."""
        if self._stream is None:
            self._stream = self._container.add_stream(
                "libx264", rate=self._fps, options=dict(_X264)
            )
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"  # the only layout that browsers and phones all play
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def _encode(frames: np.ndarray, path: Path | str, fps: float) -> None:
    """Encode `[T, H, W, 3]` uint8 with even sides as H.264."""
    with replace_file(path) as staging, Mp4Writer(staging, fps=fps) as video:
        video.add_pixels(frames)


@attrs.frozen
class SheetRow:
    """One model's row of a contact sheet: `clips [N, 3, T, H, W]`, one per prompt, in the prompts'
    order.
    """

    label: str
    clips: Tensor


def write_contact_sheet(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    path: Path | str,
    *,
    frames_shown: int = 3,
    frame_side: int = 96,
) -> None:
    """Write one picture: a column per prompt (caption above), a row per model (label at the left),
    in each cell `frames_shown` frames spread over the clip from first to last, side by side.
    Every frame is enlarged by a whole factor to at least `frame_side` pixels.

    ValueError if there is no row or a row has not one clip per prompt.
    """
    frames = max((row.clips.shape[2] for row in rows), default=1)
    picks = np.linspace(0, frames - 1, min(frames_shown, frames)).round().astype(int)
    sheet = _draw_sheet(rows, prompts, picks.tolist(), frame_side)
    with replace_file(path) as staging:
        sheet.save(staging)


def write_sheet_mp4(
    rows: Sequence[SheetRow],
    prompts: Sequence[str],
    path: Path | str,
    *,
    fps: int = 8,
    repeats: int = 4,
    frame_side: int = 160,
) -> None:
    """Write the contact sheet in motion: every cell plays its clip `repeats` times. Same errors."""
    count = min((row.clips.shape[2] for row in rows), default=0)
    sheets = [_draw_sheet(rows, prompts, [index], frame_side) for index in range(count)]
    frames = _pad_to_even(np.stack([np.asarray(sheet) for sheet in sheets]))
    _encode(np.concatenate([frames] * repeats), path, fps)


def _draw_sheet(
    rows: Sequence[SheetRow], prompts: Sequence[str], picks: Sequence[int], frame_side: int
) -> Image.Image:
    """Draw frames `picks` of every clip, a column per prompt and a row per model."""
    cells = [_row_of_cells(row, len(prompts), picks, frame_side) for row in rows]
    if not cells or not prompts:
        raise ValueError(
            f"a contact sheet of {len(rows)} rows and {len(prompts)} prompts: both must be at "
            "least 1, or there is nothing to draw; "
            "pass one SheetRow per model and the prompts that they were sampled with."
        )
    height, width = cells[0][0].shape[:2]
    font = ImageFont.load_default(_FONT_SIZE)
    captions = [_wrap_text(prompt, font, width) for prompt in prompts]
    gap, line = 12, _FONT_SIZE + 6
    left = (
        gap + max(int(font.getlength(part)) for row in rows for part in row.label.split("\n")) + gap
    )
    top = gap + line * max(len(lines) for lines in captions) + gap // 2
    sheet = Image.new(
        "RGB", (left + (width + gap) * len(prompts), top + (height + gap) * len(rows)), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        for number, text in enumerate(lines):
            pen.text((left + column * (width + gap), gap + number * line), text, _INK, font)
    for index, (row, drawn) in enumerate(zip(rows, cells, strict=True)):
        y = top + index * (height + gap)
        pen.multiline_text((gap, y + 4), row.label, _INK, font)
        for column, cell in enumerate(drawn):
            sheet.paste(Image.fromarray(cell), (left + column * (width + gap), y))
    return sheet


def _row_of_cells(
    row: SheetRow, count: int, picks: Sequence[int], frame_side: int
) -> list[np.ndarray]:
    """Draw a picture `[h, w, 3]` of each clip."""
    if row.clips.ndim != 5 or row.clips.shape[0] != count:
        raise ValueError(
            f"row {row.label!r}: clips of shape {tuple(row.clips.shape)} for {count} prompts; [N, "
            "3, T, H, W] with one clip per prompt is "
            "needed, because a column shows one prompt for every row; sample each prompt once per "
            "row."
        )
    return [_cell(_to_uint8(_check_clip(clip)), picks, frame_side) for clip in row.clips]


def _cell(frames: np.ndarray, picks: Sequence[int], frame_side: int) -> np.ndarray:
    """Draw frames `[T, H, W, 3]` side by side, with a thin line of paper between them."""
    scale = max(1, -(-frame_side // min(frames.shape[1:3])))
    large = [frames[pick].repeat(scale, 0).repeat(scale, 1) for pick in picks]
    line = np.full((large[0].shape[0], 2, 3), _PAPER, np.uint8)
    parts = [part for frame in large for part in (frame, line)][:-1]
    return np.concatenate(parts, axis=1)


def _wrap_text(
    text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int
) -> list[str]:
    """Break `text` at spaces into lines no wider than `width` pixels (a single longer word stays
    whole).
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]


def _check_clip(clip: Tensor) -> Tensor:
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(
            f"a clip of shape {tuple(clip.shape)}: [3, T, H, W] in [0, 1] is needed, because "
            "frames are written as RGB; "
            "take one clip of the batch, and decode latents first."
        )
    return clip


def _to_uint8(clip: Tensor) -> np.ndarray:
    """Convert `[3, T, H, W]` in [0, 1] to `[T, H, W, 3]` uint8."""
    return (
        (clip.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    )


def _pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Pad height and width to even numbers by repeating the edge: yuv420p stores colour for blocks
    of 2 x 2.
    """
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
