"""Views: the same noise for all, EMA weights where requested, guidance only with a negative."""

from __future__ import annotations

import contextlib

import attrs
import pytest
import torch
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import FinetuneConfig, FinetuneMethod, ViewSampler
from distill_protocols import (
    CapabilityError,
    ConditioningError,
    RoleError,
    RowGenerators,
    SamplerSpec,
    SampleView,
    StopRequested,
)
from toy_roles import CAUSAL, toy_bundle

SPEC = SamplerSpec(steps=3, shift=3.0, stochastic=True)


class OtherWeights:
    """A stand-in for an average: the weights of another seed."""

    updates = 1

    @contextlib.contextmanager
    def swapped_in(self, module):
        own = {k: v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(toy_bundle(x=77)["x"].modules["transformer"].state_dict())
        try:
            yield
        finally:
            module.load_state_dict(own)


def sample(views, *, bundle=None, has_negative=True, able=CAPABILITIES, seed=0):
    bundle = bundle or toy_bundle(student=1, teacher=1)
    adapter = ToyAdapter(bundle, capabilities=able)
    sampler = ViewSampler(
        adapter=adapter, bundle=bundle, default_spec=SPEC,
        conditioning=ToyConditioning(has_negative),
    )  # fmt: skip
    return sampler.sample_clips(views, toy_batch(2).cond, seed=seed), adapter


def test_views_share_initial_and_fresh_noise():
    """Two roles of equal weights show the same clip, and once more; another seed does not."""
    views = [SampleView(name="s", role="student"), SampleView(name="t", role="teacher")]
    clips, _ = sample(views)
    assert clips["s"].shape == (2, *LATENT_SHAPE)
    assert torch.equal(clips["s"], clips["t"])
    assert torch.equal(sample(views[::-1])[0]["s"], clips["s"])
    assert not torch.equal(sample(views, seed=1)[0]["s"], clips["s"])


def test_a_view_samples_as_the_adapter_does():
    clips, adapter = sample([SampleView(name="s", role="student")])
    generators = RowGenerators.of_clips(0, range(2))
    noise = generators.normal(LATENT_SHAPE)
    latents = adapter.sample("student", SPEC, noise, toy_batch(2).cond, generators=generators)
    assert torch.equal(clips["s"], adapter.decode(latents))


def test_validation_changes_no_state():
    bundle = toy_bundle(student=1)
    before = torch.random.get_rng_state()
    _, adapter = sample([SampleView(name="s", role="student")], bundle=bundle)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(call.with_gradient for call in adapter.calls)
    module = bundle["student"].modules["transformer"]
    assert module.training
    assert all(p.requires_grad for p in module.parameters())


def test_a_view_uses_its_own_sampler_and_guidance():
    spec = SamplerSpec(steps=5, guidance=3.0)
    views = [SampleView(name="t", role="teacher", sampler=spec)]
    _, adapter = sample(views)
    assert [call.cfg for call in adapter.calls] == [3.0] * 5
    with pytest.raises(ConditioningError, match="no negative"):
        sample(views, has_negative=False)


def test_ema_weights_are_used_where_asked_and_put_back():
    bundle = toy_bundle(student=1)
    bundle["student"].ema["transformer"] = OtherWeights()
    views = [
        SampleView(name="live", role="student"),
        SampleView(name="ema", role="student", ema=True),
        SampleView(name="again", role="student"),
    ]
    clips, _ = sample(views, bundle=bundle)
    other, _ = sample([SampleView(name="x", role="student")], bundle=toy_bundle(student=77))
    assert torch.equal(clips["ema"], other["x"])
    assert torch.equal(clips["live"], clips["again"])
    assert not torch.equal(clips["live"], clips["ema"])


def test_impossible_views_are_refused():
    view = SampleView(name="s", role="student", ema=True)
    with pytest.raises(RoleError, match="keeps no EMA"):
        sample([view])
    with pytest.raises(RoleError, match=r"missing role.*critic"):
        sample([SampleView(name="c", role="critic")])
    with pytest.raises(CapabilityError, match="supports_decode"):
        sample([view], able=attrs.evolve(CAPABILITIES, supports_decode=False))


def test_a_method_shows_its_student_by_its_own_sampler():
    bundle = toy_bundle(student=1)
    method = FinetuneMethod(bundle, ToyAdapter(bundle), FinetuneConfig(student_sampler=SPEC),
                            conditioning=ToyConditioning())  # fmt: skip
    assert method.sampler_spec == SPEC
    clips = method.sample_for_logging(
        [SampleView(name="s", role="student")], toy_batch(2).cond, seed=0
    )
    expected, _ = sample([SampleView(name="s", role="student")], bundle=bundle)
    assert torch.equal(clips["s"], expected["s"])


def test_a_validation_stops_between_model_calls_and_before_decoding():
    """Averages are taken out again, gradients are back, and no view is half there."""
    bundle = toy_bundle(student=1)
    bundle["student"].ema["transformer"] = OtherWeights()
    method = FinetuneMethod(bundle, ToyAdapter(bundle), FinetuneConfig(student_sampler=SPEC),
                            conditioning=ToyConditioning())  # fmt: skip
    module = bundle["student"].modules["transformer"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    views = [SampleView(name="ema", role="student", ema=True)]
    polls = []

    def ask_at(number: int) -> None:
        polls.append(len(method.adapter.calls))
        if len(polls) == number:
            raise StopRequested("preempted")

    for number in range(1, SPEC.steps + 2):
        polls.clear()
        method.adapter.calls.clear()
        method.stop.poll = lambda number=number: ask_at(number)
        with pytest.raises(StopRequested):
            method.sample_for_logging(views, toy_batch(2).cond, seed=0)
        assert polls == list(range(number)), "before each call, and before decoding"
        assert len(method.adapter.calls) == number - 1
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert module.training
        assert all(p.requires_grad for p in module.parameters())


def test_a_causal_role_makes_videos_of_any_length():
    config = FinetuneConfig(student_sampler=SPEC)
    bundle = toy_bundle(student=1, teacher=1)
    adapter = ToyAdapter(bundle, capabilities=CAUSAL)
    method = FinetuneMethod(bundle, adapter, config, conditioning=ToyConditioning())
    frames, cond = LATENT_SHAPE[1], toy_batch(2).cond
    views = [
        SampleView(name="clip", role="student"),
        SampleView(name="as long", role="student", latent_frames=frames),
        SampleView(name="long", role="student", latent_frames=3 * frames),
    ]
    clips = method.sample_for_logging(views, cond, seed=0)
    assert torch.equal(clips["clip"], clips["as long"])
    assert clips["long"].shape == (2, 3, 3 * clips["clip"].shape[2], *clips["clip"].shape[3:])
    whole = method.sample_latents(views[2], cond, seed=0, rows=[0, 1])
    assert torch.equal(clips["long"], adapter.decode(whole))
    [second] = method.sample_for_logging(views[2:], cond[1:], seed=0, rows=[1]).values()
    torch.testing.assert_close(second, clips["long"][1:], rtol=0, atol=1e-6)
    with pytest.raises(CapabilityError, match=r"'teacher', which makes a clip as a whole"):
        method.sample_for_logging(
            [SampleView(name="t", role="teacher", latent_frames=9)], cond, seed=0
        )


def test_predictions_share_the_noise_and_touch_nothing():
    bundle = toy_bundle(student=1, teacher=1, critic=2)
    method = FinetuneMethod(bundle, ToyAdapter(bundle), FinetuneConfig(student_sampler=SPEC),
                            conditioning=ToyConditioning())  # fmt: skip
    cond, view = toy_batch(2).cond, SampleView(name="t", role="teacher")
    before, streams = torch.random.get_rng_state(), method.streams.state_dict()
    latents = method.sample_latents(view, cond, seed=0, rows=[0, 1])
    clips = method.sample_for_logging([view], cond, seed=0)["t"]
    assert torch.equal(method.decode_latents(latents), clips)

    def x0(role, t, of=latents, rows=(0, 1)):
        part = cond[torch.tensor(rows)]
        return method.predict_latents(role, of, t, part, seed=0, rows=rows)

    assert torch.equal(x0("student", 500.0), x0("teacher", 500.0)), "of equal weights"
    assert not torch.equal(x0("student", 500.0), x0("critic", 500.0))
    assert torch.equal(x0("student", 1000.0), x0("student", 1000.0, of=-latents)), "pure noise"
    near, far = ((x0("student", t) - latents).abs().mean() for t in (10.0, 900.0))
    assert near < far / 10
    alone = x0("student", 500.0, of=latents[1:], rows=(1,))
    torch.testing.assert_close(alone, x0("student", 500.0)[1:], rtol=0, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert method.streams.state_dict().keys() == streams.keys()
    assert bundle["student"].modules["transformer"].training
    assert not x0("student", 500.0).requires_grad
