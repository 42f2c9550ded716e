"""Latents of several named parts: what methods compute on each, and that one part is one tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import evolve
from distill_conformance import MethodCase, MethodSuite
from distill_conformance.toy import ToyConditioning, toy_batch, toy_models
from distill_conformance.toy.networks import CLIP, LATENT_SHAPE, SOUND, SOUND_SHAPE, SOUND_WEIGHT
from distill_methods import (
    ConsistencyConfig,
    Continuous,
    Discrete,
    DMD2Config,
    FinetuneConfig,
    GanConfig,
    KDConfig,
    LaddConfig,
    RCMConfig,
    TeacherOnlyConfig,
)
from distill_methods.maths import dmd_gradient, dmd_loss
from distill_methods.parts import map_masked, sum_part_losses
from distill_protocols import (
    CapabilityError,
    ContractError,
    LatentParts,
    RandomStreams,
    SamplerSpec,
    SampleView,
    flatten_parts,
    map_latents,
    restore_parts,
)
from distill_runtime import load_plugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FOUR = SamplerSpec(steps=4, shift=5.0, stochastic=True)
TRAINED: dict[str, Any] = {
    "finetune": FinetuneConfig(),
    "teacher_only": TeacherOnlyConfig(),
    "dmd2": DMD2Config(student_sampler=FOUR, critic_update="every_step"),
    "consistency": ConsistencyConfig(discrete=Discrete(steps=8, shift=8.0, skip=2)),
}
REFUSED: dict[str, Any] = {
    "dmd2": DMD2Config(student_sampler=FOUR, gan=GanConfig()),
    "consistency": ConsistencyConfig(continuous=Continuous(tangent_warmup=3)),
    "rcm": RCMConfig(student_sampler=FOUR),
    "ladd": LaddConfig(student_sampler=FOUR),
    "kd": KDConfig(student_sampler=FOUR),
}
LOSS = {"dmd2": ("dmd_loss", "critic_loss"), "consistency": ("consistency_loss",)}


def parts_of(*seeds: int, shapes: tuple[tuple[int, ...], ...]) -> list[LatentParts]:
    """One value of parts for each seed."""
    return [
        LatentParts(
            {
                f"part {i}": torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
                for i, shape in enumerate(shapes)
            }
        )
        for seed in seeds
    ]


SHAPES = st.lists(
    st.tuples(*[st.integers(1, 3)] * 4), min_size=1, max_size=3
).map(tuple)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_rows_hold_all_parts_and_elementwise_maths_is_the_same_on_them(shapes, seed) -> None:
    x, y = parts_of(seed, seed + 1, shapes=shapes)

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return 0.3 * a + 0.7 * b

    of_parts = map_latents(mix, x, y)
    of_rows = restore_parts(mix(flatten_parts(x), flatten_parts(y)), x)

    assert list(of_rows.tensors) == list(x.tensors)
    assert flatten_parts(x).shape == (2, 1, 1, 1, sum(math.prod(shape) for shape in shapes))
    for name, tensor in of_parts.tensors.items():
        assert torch.equal(tensor, of_rows.tensors[name])


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99), masked=st.booleans())
def test_each_part_has_the_numbers_that_it_has_as_the_only_tensor(shapes, seed, masked) -> None:
    x, fake, real = parts_of(seed, seed + 1, seed + 2, shapes=shapes)
    mask = None
    if masked:
        mask = torch.ones(1, 1, shapes[0][1] + 1, 1, 1)[:, :, : shapes[0][1]]
        mask[:, :, 0] = 0.0 if shapes[0][1] > 1 else 1.0
    adapter = toy_models(FinetuneConfig().roles, sound=True)[0]
    weights = {name: 0.5 + i for i, name in enumerate(x.tensors)}
    weighted: Any = type("Adapter", (), {"parts": type("Joint", (), {"part_weights": weights})()})

    gradient = map_masked(dmd_gradient, x, fake, real, loss_mask=mask)
    loss, metrics = sum_part_losses(weighted, "dmd_loss", dmd_loss, x, gradient, loss_mask=mask)

    alone = {}
    for name, tensor in x.tensors.items():
        own = mask if tensor is x.main else None
        g = dmd_gradient(tensor, fake.tensors[name], real.tensors[name], own)
        assert torch.equal(gradient.tensors[name], g)
        alone[name] = sum_part_losses(adapter, "dmd_loss", dmd_loss, tensor, g, loss_mask=own)[0]
        assert torch.equal(metrics[f"dmd_loss/{name}"], alone[name])
    torch.testing.assert_close(loss, sum(weights[n] * v for n, v in alone.items()))  # type: ignore[arg-type]
    if len(shapes) == 1:
        assert torch.equal(loss, 0.5 * alone["part 0"])


def test_parts_do_not_mix_with_tensors_or_other_parts() -> None:
    [one] = parts_of(0, shapes=((1, 1, 1, 1),))
    [two] = parts_of(0, shapes=((1, 1, 1, 1), (1, 1, 1, 1)))
    for first, second in ((one, two), (one.main, one), (one, one.main)):
        with pytest.raises(ContractError, match="same parts"):
            map_latents(torch.add, first, second)  # type: ignore[type-var]
    with pytest.raises(ContractError, match="same clips"):
        LatentParts({"a": torch.zeros(1, 1, 1, 1, 1), "b": torch.zeros(2, 1, 1, 1, 1)})


@pytest.fixture(scope="module", params=TRAINED)
def case(request) -> MethodCase:
    config = TRAINED[request.param]
    one = SamplerSpec(steps=1, stochastic=True)
    return MethodCase(
        plugin=load_plugin("distill.methods", request.param),
        config=config,
        accumulation_config=evolve(config, student_sampler=one)
        if request.param == "dmd2"
        else config,
        sound=True,
    )


class TestMethodsWithSound(MethodSuite):
    """Methods that train several parts pass the suite of methods with them."""


def build(name: str, config: Any) -> Any:
    adapter, bundle = toy_models(config.roles, sound=True)
    return load_plugin("distill.methods", name).build(
        config,
        bundle=bundle,
        adapter=adapter,
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_is_the_weighted_sum_of_its_parts(name) -> None:
    losses, outputs = build(name, TRAINED[name]).single_train_step(toy_batch(3, sound=True), 5)
    total = sum(
        outputs[f"{loss}/{CLIP}"] + SOUND_WEIGHT * outputs[f"{loss}/{SOUND}"]
        for loss in LOSS.get(name, ("velocity_loss",))
    )
    torch.testing.assert_close(losses["total_loss"].detach(), total)
    assert outputs["student_x0"].shape == (3, *LATENT_SHAPE)
    assert outputs[f"student_x0/{SOUND}"].shape == (3, *SOUND_SHAPE)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_of_one_tensor_refuse_parts(name) -> None:
    with pytest.raises(CapabilityError, match="one_latent_tensor"):
        build(name, REFUSED[name])


def test_validation_shows_the_main_part_and_starts_from_noise_of_each() -> None:
    method = build("finetune", TRAINED["finetune"])
    cond = toy_batch(2, sound=True).cond
    view = SampleView(name="student", role="student", sampler=SamplerSpec(steps=2))
    latents = method.sample_latents(view, cond, seed=0, rows=range(2))
    assert latents.shapes == {CLIP: LATENT_SHAPE, SOUND: SOUND_SHAPE}
    clips = method.sample_for_logging([view], cond, seed=0)["student"]
    assert torch.equal(clips, method.decode_latents(latents))
    x0 = method.predict_latents("student", latents, 500.0, cond, seed=0, rows=range(2))
    assert x0.shapes == latents.shapes
