"""Streaming long tuning: which frames are called, scored and kept, and that the videos resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attrs import define, field
from distill_conformance.toy import LATENT_SHAPE, ToyAdapter, ToyConditioning, toy_batch
from distill_methods import GanConfig, StreamingConfig, StreamingMethod
from distill_methods.streaming_long_tuning.config import window_problems
from distill_protocols import Chunk, ContractError, RandomStreams, SamplerSpec
from toy_roles import CAUSAL, toy_bundle

FRAMES = LATENT_SHAPE[1]
ONE = SamplerSpec(steps=1, stochastic=True)


@define(eq=False)
class Seeing(ToyAdapter):
    """Keeps the new frames that are made with gradient, and theirs."""

    seen: list[torch.Tensor] = field(factory=list)

    def extend(self, *args: Any, **options: Any) -> torch.Tensor:
        x = super().extend(*args, **options)
        if x.requires_grad:
            x.retain_grad()
            self.seen.append(x)
        return x


def build(adapter: type[ToyAdapter] = ToyAdapter, seed: int = 0, **options: Any) -> StreamingMethod:
    config: dict[str, Any] = {
        "generator_update_interval": 2, "student_sampler": ONE, "overlap_frames": 1,
        "video_frames": FRAMES + 2 * (FRAMES - 1),
    }  # fmt: skip
    bundle = toy_bundle(student=1, teacher=2, critic=3)
    return StreamingMethod(
        bundle,
        adapter(bundle, capabilities=CAUSAL),
        StreamingConfig(**config | options),
        conditioning=ToyConditioning(),
        streams=RandomStreams(seed),
    )


def run(method: StreamingMethod, iterations: range, batches: int = 1) -> list[dict[str, Any]]:
    outputs = []
    for iteration in iterations:
        for number in range(batches):
            batch = toy_batch(2, seed=100 * iteration + number)
            result = method.single_train_step(batch, iteration)
            result.loss_map["total_loss"].backward()
            outputs.append(result.outputs)
        method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
    return outputs


def test_a_video_goes_on_and_begins_anew():
    """Three windows, then the next video; the overlap is the end of the window before."""
    method = build()
    outputs = run(method, range(1, 6))
    ends = [FRAMES, 2 * FRAMES - 1, 3 * FRAMES - 2, FRAMES, 2 * FRAMES - 1]
    assert [int(one["video_frame"]) for one in outputs] == ends
    for n, (before, after) in enumerate(itertools.pairwise(outputs), start=1):
        follows = torch.equal(before["student_x0"][:, :, -1:], after["student_x0"][:, :, :1])
        assert follows == (n != 3), n


def test_the_new_frames_alone_train_the_student():
    """dL/dx = g / numel on new frames and 0 on the overlap, of which x is detached."""
    method = build(Seeing, generator_update_interval=1, critic_update="every_step")
    seen = method.adapter.seen
    outputs = run(method, range(1, 3))
    # The critic takes the first window, and the third.
    assert [x.shape[2] for x in seen] == [FRAMES - 1, FRAMES]
    for x, one in zip(seen, outputs, strict=True):
        new = slice(-x.shape[2], None)
        d = (one["critic_x0"] - one["teacher_x0"])[:, :, new]
        mean = (one["student_x0"] - one["teacher_x0"])[:, :, new].abs().flatten(1).mean(dim=1)
        expected = d / mean.view(-1, 1, 1, 1, 1) / x.numel()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-8)


def test_a_video_keeps_its_prompts_until_it_is_switched():
    prompts = [toy_batch(2, seed=100 * n).cond.tensors["text"] for n in range(6)]

    def prompt_of(method: StreamingMethod) -> torch.Tensor:
        return method._videos[0].cond.tensors["text"]

    for p, own in ((0.0, [1, 1, 1, 4, 4]), (1.0, [1, 2, 3, 4, 5])):
        method = build(switch_probability=p)
        for iteration, expected in enumerate(own, start=1):
            run(method, range(iteration, iteration + 1))
            assert torch.equal(prompt_of(method), prompts[expected])


def test_each_micro_step_has_a_video_of_its_own_and_all_of_them_resume():
    whole, parts, other = (build(switch_probability=0.5) for _ in range(3))
    run(parts, range(1, 3), batches=2)
    state = parts.rank_state()
    assert list(state) == ["0", "1"]
    streams = parts.streams.state_dict()
    weights = {key: module.state_dict() for key, module in parts.model_dict.items()}
    weights = {key: {n: v.clone() for n, v in s.items()} for key, s in weights.items()}
    optimizers = {key: o.state_dict() for key, o in parts.optimizer_dict.items()}
    run(whole, range(1, 3), batches=2)
    expected = run(whole, range(3, 6), batches=2)
    run(other, range(1, 2), batches=2)  # something else to forget
    other.load_rank_state(state)
    other.streams.load_state_dict(streams)
    for key, module in other.model_dict.items():
        module.load_state_dict(weights[key])
    for key, optimizer in other.optimizer_dict.items():
        optimizer.load_state_dict(optimizers[key])
    actual = run(other, range(3, 6), batches=2)
    for one, two in zip(expected, actual, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    # Begun anew, it is another video.
    other.load_rank_state({})
    assert other.rank_state() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_frames": FRAMES}, "nothing in it would be new"),
        ({"video_frames": FRAMES}, "would end with its first window"),
    ],
)
def test_windows_that_cannot_be_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ContractError, match=message):
        build(**options)


def test_a_discriminator_is_refused_for_its_prompts():
    (problem,) = window_problems(
        StreamingConfig(gan=GanConfig()), lambda n: tuple(Chunk(i, 1) for i in range(n)), 21
    )
    assert "clips of the data under the same prompts" in problem.message
