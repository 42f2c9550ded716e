"""Which frames of a clip a model can be given, and why not."""

from __future__ import annotations

import pytest
from distill_protocols import FrameConditions, GivenFrames

TEXT = FrameConditions()
PICTURE = FrameConditions(first="always")
PAIR = FrameConditions(first="always", last="always")
EITHER = FrameConditions(first="optional", several=True, last="optional", frames_a_latent=8)


@pytest.mark.parametrize(
    ("model", "first", "last", "problem"),
    [
        (TEXT, 0, False, None),
        (TEXT, 1, False, "reads text alone"),
        (PICTURE, 0, False, "no first frame"),
        (PICTURE, 1, False, None),
        (PICTURE, 1, True, "reads first ones alone"),
        (PICTURE, 9, False, "the model reads one"),
        (PAIR, 1, False, "no last frame"),
        (PAIR, 0, True, "no first frame"),
        (PAIR, 1, True, None),
        (EITHER, 0, False, None),
        (EITHER, 0, True, "no first frame"),
        (EITHER, 1, True, None),
        (EITHER, 9, True, None),
        (EITHER, 8, False, r"8k + 1"),
        (EITHER, 17, False, "leaves nothing to be made"),
        (EITHER, 25, True, "leaves nothing to be made"),
    ],
)
def test_what_is_given_is_what_a_model_reads(model, first, last, problem):
    text = model.problem(GivenFrames(first=first, last=last), frames=17)
    assert (text is None) if problem is None else problem in (text or "")


@pytest.mark.parametrize("model", [TEXT, PICTURE, PAIR, EITHER])
def test_a_model_takes_what_it_cannot_do_without(model):
    assert model.problem(model.least, frames=17) is None
    assert bool(model.least) == (model.first == "always")
