"""The judge in configs/tiny/judge reaches the README's accuracy on held-out clips."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from distill_evaluation import (
    Judge,
    attribute_accuracy,
    feature_statistics,
    frechet_distance,
)
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "configs" / "tiny" / "judge"


@cache
def moving_digits() -> ModuleType:
    """Load the module from its file: `tools/` is no package."""
    path = REPOSITORY / "tools" / "tiny_wan" / "moving_digits.py"
    spec = importlib.util.spec_from_file_location("tiny_wan_moving_digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, list[str]]:
    """400 clips of the held-out images and their captions."""
    digits = moving_digits()
    clips = digits.draw_clips(digits.load_images("reference"), 400, seed=99)
    return digits.to_rgb(clips.grey), clips.captions()


def test_it_reads_held_out_clips(held_out: tuple[torch.Tensor, list[str]]) -> None:
    clips, captions = held_out
    judge = Judge.load(FOLDER)
    answers, expected = judge.classify(clips), judge.expected(captions)
    assert attribute_accuracy(answers["digit"], expected["digit"]) >= 0.94
    assert attribute_accuracy(answers["direction"], expected["direction"]) >= 0.99


def test_held_out_clips_are_near_the_reference_and_spoilt_ones_far(
    held_out: tuple[torch.Tensor, list[str]],
) -> None:
    clips, _ = held_out
    judge = Judge.load(FOLDER)
    reference = feature_statistics(load_file(FOLDER / "reference.safetensors")["features"])
    blurred = torch.nn.functional.avg_pool3d(clips, (1, 3, 3), 1, (0, 1, 1))
    two_at_once = (clips + clips.flip(-1)) / 2
    near, *far = (
        frechet_distance(feature_statistics(judge.features(part)), reference)
        for part in (clips, blurred, two_at_once)
    )
    assert near < 8
    assert min(far) > 40


def test_the_prompts_file_holds_every_caption_once() -> None:
    prompts = (FOLDER / "prompts.txt").read_text().splitlines()
    assert sorted(prompts) == sorted(moving_digits().all_captions())
    Judge.load(FOLDER).expected(prompts)


def test_the_three_sets_of_images_are_disjoint() -> None:
    digits = moving_digits()
    seen: set[bytes] = set()
    for split, count in (("train", 3000), ("judge", 1200), ("reference", 800)):
        images = {image.tobytes() for image in digits.load_images(split).pixels}
        assert len(images) == count
        assert not images & seen
        seen |= images
