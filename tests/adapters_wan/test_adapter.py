"""Model calls, guidance, latents, text and the sampler."""

from __future__ import annotations

import itertools
import json

import attrs
import pytest
import torch
from distill_diffusers.sampling import sampler as sampling
from distill_protocols import (
    CapabilityError,
    Condition,
    ConditioningError,
    ContractError,
    RowGenerators,
    SamplerSpec,
    StopRequested,
    WeightsError,
)

SHAPE = (4, 2, 4, 6)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch, seed=1):
    return Condition({"text": normal(batch, 6, 16, seed=seed)})


@pytest.fixture
def call():
    return {"x_t": normal(2, *SHAPE), "t": torch.tensor([900.0, 333.3]), "cond": text(2)}


def test_calls_beyond_the_capabilities_are_refused(adapter, call):
    adapter.capabilities.require(["supports_cfg", "supports_decode", "pred:x0"], by="test")
    with pytest.raises(CapabilityError, match="features"):
        adapter.forward("teacher", **call, neg_cond=text(1, seed=3), cfg=4.0, features={0: None})
    with pytest.raises(CapabilityError, match="caches"):
        adapter.forward("teacher", **call, caches={})


# -- model calls and guidance ---------------------------------------------------------------------


@torch.no_grad()
def test_guidance_one_is_conditional_and_zero_unconditional(adapter, call, count_calls):
    negative = text(1, seed=3)
    conditional = adapter.forward("teacher", **call)
    swapped = {**call, "cond": negative}
    unconditional = adapter.forward("teacher", **swapped)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    with count_calls(adapter) as calls:
        one = adapter.forward("teacher", **call, neg_cond=negative, cfg=1.0)
        zero = adapter.forward("teacher", **call, neg_cond=negative, cfg=0.0)
    assert calls == [2, 2]
    assert torch.equal(one, conditional)
    assert torch.equal(zero, unconditional)


@torch.no_grad()
def test_guidance_formula_and_batching(make_adapter, config, call, count_calls):
    negative, w = text(1, seed=3), 3.0
    batched, _ = make_adapter(teacher=(False, "fp32"))
    config = attrs.evolve(config, cfg_batched=False)
    single, _ = make_adapter(config=config, teacher=(False, "fp32"))
    c = single.forward("teacher", **call)
    u = single.forward("teacher", **{**call, "cond": negative})
    with count_calls(single) as calls:
        two = single.forward("teacher", **call, neg_cond=negative, cfg=w)
    assert calls == [2, 2]
    with count_calls(batched) as calls:
        one = batched.forward("teacher", **call, neg_cond=negative, cfg=w)
    assert calls == [4]
    assert torch.equal(two, u + w * (c - u))
    assert torch.allclose(one, two, atol=1e-5)


def test_sixteen_bit_roles(make_adapter, call):
    """fp32 out, and within a few per cent of the fp32 role; gradients reach fp32 weights."""
    adapter, bundle = make_adapter(
        exact=(False, "fp32"), frozen=(False, "bf16"), trained=(True, "bf16")
    )
    exact = adapter.forward("exact", **call)
    for name in ("frozen", "trained"):
        rough = adapter.forward(name, **call)
        assert rough.dtype == torch.float32
        error = (rough - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.03, (name, error)
    rough.square().mean().backward()
    gradients = [p.grad for p in bundle["trained"].modules["transformer"].parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    assert all(p.grad is None for p in bundle["frozen"].modules["transformer"].parameters())


@torch.no_grad()
@pytest.mark.parametrize("outer", [False, True])
def test_a_frozen_sixteen_bit_role_is_diffusers_own(make_adapter, pipeline_template, call, outer):
    """Bit for bit, also where a method wraps its step in autocast."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    adapter, _ = make_adapter(teacher=(False, "bf16"))
    theirs = WanTransformer3DModel.from_pretrained(
        pipeline_template / "transformer", torch_dtype=torch.bfloat16
    ).eval()
    (expected,) = theirs(
        call["x_t"].bfloat16(),
        timestep=call["t"],
        encoder_hidden_states=call["cond"].tensors["text"].bfloat16(),
        return_dict=False,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        assert torch.equal(adapter.forward("teacher", **call), expected.float())


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (Condition({"text": torch.zeros(2, 5, 16)}), r"\[5, 16\] a row.*max_sequence_length"),
        (Condition({"text": torch.zeros(2, 6, 8)}), r"\[6, 8\] a row, and the model takes \[6, 16"),
        (Condition({"image": torch.zeros(2, 6, 16)}), "'text' of the condition is absent"),
    ],
)
def test_a_condition_of_another_kind(adapter, call, wrong, word):
    with pytest.raises(ConditioningError, match=word):
        adapter.forward("teacher", **{**call, "cond": wrong})


# -- latents and pixels ---------------------------------------------------------------------------


def test_latent_shape_follows_clip_and_vae(adapter):
    assert adapter.latent_shape == SHAPE


def test_encode_and_decode(adapter):
    video = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0))
    raw = adapter.encode(video)
    assert raw.shape == (2, *SHAPE)
    clips = adapter.decode(adapter.normalize_latents(raw).requires_grad_())
    assert clips.shape == video.shape
    assert not clips.requires_grad
    assert clips.min() >= 0
    assert clips.max() <= 1
    assert clips.std() > 0.001


def test_a_clip_that_does_not_fit_is_refused(make_adapter, config):
    with pytest.raises(WeightsError, match="positions"):
        make_adapter(config=attrs.evolve(config, width=272), teacher=(False, "fp32"))


# -- text -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_as_stock_wan_encodes_it(adapter, pipeline_template):
    """Clean-up included: entities, spaces and line breaks."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    prompts = ["a seven  moving\n left", " a &amp;amp; seven ", ""]
    stock = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pipeline_template / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline_template / "text_encoder"),
        vae=None,
        scheduler=None,
    )
    expected, _ = stock.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=6, device="cpu"
    )
    ours = adapter.encode_condition(prompts).tensors["text"]
    assert torch.equal(ours, expected)
    lengths = [5, 4, 1]
    for row, length in zip(ours, lengths, strict=True):
        assert row[length:].abs().sum() == 0
        assert (row[:length].abs().sum(-1) > 0).all()
    assert len(adapter.encode_neg_condition("")) == 1


def test_fingerprint_follows_length_and_precision(make_adapter, pipeline, config):
    def fingerprint(**change):
        adapter, _ = make_adapter(config=attrs.evolve(config, **change), source=pipeline)
        return adapter.condition_fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    for option, value, entry in (
        ("max_sequence_length", 5, "text_encoder.length"),
        ("text_encoder_precision", "bf16", "text_encoder.precision"),
    ):
        other = fingerprint(**{option: value})
        assert {name for name in first if other[name] != first[name]} == {entry, "encoder"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"latents_mean": [0.5]}, "statistics of 1 "),
        ({"latents_std": [0.0] * 4}, "above 0"),
        ({"latents_std": [1.0, 1.0, 1.0, float("inf")]}, "Infinity is no JSON number"),
    ],
)
def test_statistics_that_cannot_normalise_are_refused(make_adapter, pipeline, change, word):
    file = pipeline / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=word):
        make_adapter(source=pipeline)


def test_an_untied_embedding_is_refused(make_adapter, pipeline, monkeypatch):
    from transformers import UMT5EncoderModel

    real = UMT5EncoderModel.from_pretrained

    def untied(*args, **kwargs):
        encoder, info = real(*args, **kwargs)
        table = encoder.encoder.embed_tokens.weight
        encoder.encoder.embed_tokens.weight = torch.nn.Parameter(torch.zeros_like(table))
        return encoder, info

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", untied)
    adapter, _ = make_adapter(source=pipeline)
    with pytest.raises(WeightsError, match="embed_tokens"):
        adapter.encode_condition(["a"])


def test_a_missing_text_encoder_is_an_error_when_it_is_needed(make_adapter, pipeline):
    import shutil

    shutil.rmtree(pipeline / "text_encoder")
    adapter, _ = make_adapter(source=pipeline, teacher=(False, "fp32"))
    assert adapter.condition_fingerprint() == {}
    with pytest.raises(WeightsError, match="store the embeddings"):
        adapter.encode_condition(["a"])


def test_a_fingerprint_is_never_worth_a_download(make_adapter, pipeline_template, monkeypatch):
    """Nor is half an encoder hashed: its cache entry would be believed."""
    import huggingface_hub
    from distill_adapters_wan.text import wan_encoders

    asked = []

    def snapshot(hub_id, **how):
        asked.append(how.get("local_files_only"))
        return str(pipeline_template.parent)  # a snapshot without text_encoder/

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = make_adapter(teacher=(False, "fp32"))[0]._config
    encoders = wan_encoders("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", config, device=torch.device("cpu"))
    assert encoders.fingerprint() == {}
    assert asked == [True]


def test_the_text_encoder_is_freed_after_each_call_and_kept_within(make_adapter, monkeypatch):
    import gc
    import weakref

    from distill_diffusers.components import encoders as components

    loaded = []
    real = components.load_encoder

    def load(*args):
        encoder = real(*args)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(components, "load_encoder", load)
    adapter, _ = make_adapter(teacher=(False, "fp32"))
    adapter.encode_condition(["a seven"])
    gc.collect()
    assert [encoder() for encoder in loaded] == [None]
    with adapter.keep_encoders_loaded():
        adapter.encode_condition(["a seven"])
        adapter.encode_neg_condition("left")
        assert len(loaded) == 2
    gc.collect()
    assert [encoder() for encoder in loaded] == [None, None]


def test_components_come_back_after_they_were_freed(make_adapter):
    adapter, _ = make_adapter(teacher=(False, "fp32"))
    first = adapter.encode_condition(["a seven"]).tensors["text"]
    clip = adapter.decode(torch.zeros(1, *SHAPE))
    adapter.free_components()
    assert torch.equal(adapter.encode_condition(["a seven"]).tensors["text"], first)
    assert torch.equal(adapter.decode(torch.zeros(1, *SHAPE)), clip)


# -- sampling -------------------------------------------------------------------------------------


def test_one_step_is_the_predicted_x0(adapter):
    noise, cond = normal(2, *SHAPE), text(2)
    with torch.no_grad():
        x0 = adapter.forward("teacher", noise, torch.tensor([1000.0] * 2), cond, fwd_pred_type="x0")
    for stochastic in (False, True):
        spec = SamplerSpec(steps=1, stochastic=stochastic)
        assert torch.allclose(adapter.sample("teacher", spec, noise, cond), x0, atol=1e-6)


def test_euler_by_hand(adapter):
    """x <- x + (s' - s) v at the spec's own timesteps, down to 0."""
    spec = SamplerSpec(steps=3, timesteps=(1000.0, 833.33, 210.0), guidance=2.0)
    noise, cond, negative = normal(1, *SHAPE), text(1), text(1, seed=3)
    x = noise
    with torch.no_grad():
        for t, after in ((1000.0, 833.33), (833.33, 210.0), (210.0, 0.0)):
            v = adapter.forward("teacher", x, torch.tensor([t]), cond, neg_cond=negative, cfg=2.0)
            x = x + (after - t) / 1000 * v
    ours = adapter.sample("teacher", spec, noise, cond, neg_cond=negative)
    assert torch.allclose(ours, x, atol=1e-5)


def test_stochastic_by_hand(adapter):
    """x0 prediction, then fresh noise at the next time."""
    spec = SamplerSpec(steps=2, timesteps=(1000.0, 750.0), stochastic=True)
    noise, cond = normal(1, *SHAPE), text(1)
    fresh = RowGenerators.seeded(5, "fresh", [0]).normal(SHAPE)
    with torch.no_grad():
        x0 = adapter.forward("teacher", noise, torch.tensor([1000.0]), cond, fwd_pred_type="x0")
        x_t = adapter.add_noise(x0, fresh, torch.tensor([750.0]))
        x0 = adapter.forward("teacher", x_t, torch.tensor([750.0]), cond, fwd_pred_type="x0")
    generators = RowGenerators.seeded(5, "fresh", [0])
    ours = adapter.sample("teacher", spec, noise, cond, generators=generators)
    assert torch.allclose(ours, x0, atol=1e-5)


def test_sampling_polls_before_each_step_and_ends_with_what_that_raises(adapter, count_calls):
    spec, noise, cond, polls = SamplerSpec(steps=3), normal(1, *SHAPE), text(1), []

    with count_calls(adapter) as calls:

        def poll() -> None:
            polls.append(len(calls))
            if len(polls) == 5:
                raise StopRequested("preempted")

        clip = adapter.sample("teacher", spec, noise, cond, poll=poll)
        assert polls == [0, 1, 2]
        with pytest.raises(StopRequested):
            adapter.sample("teacher", spec, noise, cond, poll=poll)
        assert len(calls) == 4
    assert torch.equal(clip, adapter.sample("teacher", spec, noise, cond))


def test_sampler_refusals(adapter):
    spec = SamplerSpec(steps=2, stochastic=True)
    with pytest.raises(ContractError, match="needs generators"):
        adapter.sample("teacher", spec, normal(1, *SHAPE), text(1))
    with pytest.raises(ContractError, match="needs generators"):
        adapter.rollout("teacher", spec, normal(1, *SHAPE), text(1), exit_steps=[1])
    generators = RowGenerators.seeded(0, "fresh", [0])
    with pytest.raises(ContractError, match="1 generators for 2 rows"):
        adapter.sample("teacher", spec, normal(2, *SHAPE), text(2), generators=generators)
    with pytest.raises(ContractError, match="noise is"):
        adapter.sample("teacher", SamplerSpec(steps=1), normal(1, 4, 3, 4, 6), text(1))


# -- what is seen on the way ----------------------------------------------------------------------


def gaussian(spread: float):
    """Return the exact flow of data ~ N(0, spread^2): every x keeps its place in units of the std
    at s, sqrt((1 - s)^2 spread^2 + s^2)."""

    def std(s):
        return ((1 - s) ** 2 * spread**2 + s**2) ** 0.5

    def velocity(x, t):
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        return x * (s - (1 - s) * spread**2) / std(s) ** 2

    return velocity, std


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_states_at_each_step_follow_the_closed_form(spread):
    velocity, std = gaussian(spread)
    spec = SamplerSpec(steps=400, shift=3.0)
    noise, seen = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0)), {}
    clean = sampling.sample(velocity, spec, noise, on_step=seen.__setitem__)
    assert list(seen) == list(range(400))
    assert seen[0].equal(noise)
    for step, x in [*seen.items(), (400, clean)]:
        s = [*spec.sigmas(), 0.0][step]
        error = (x - noise * std(s)).abs().max() / max(spread, 1)  # std at s = 1 is 1
        assert error < 0.02, (step, float(error))  # Euler's own, of 400 steps
    for before, after in itertools.pairwise(range(400)):
        s, then = spec.sigmas()[before], spec.sigmas()[after]
        by_hand = seen[before] + (then - s) * velocity(seen[before], torch.full((2,), 1000 * s))
        torch.testing.assert_close(seen[after], by_hand, rtol=1e-5, atol=1e-6)


def test_on_step_does_not_change_the_sample(adapter):
    noise, cond = normal(2, *SHAPE), text(2)
    spec, seen = SamplerSpec(steps=3, shift=3.0), {}
    shown = adapter.sample("teacher", spec, noise, cond, on_step=seen.__setitem__)
    assert shown.equal(adapter.sample("teacher", spec, noise, cond))
    assert seen[0].equal(noise)
    rest = SamplerSpec(steps=1, timesteps=(1000 * spec.sigmas()[2],))
    assert shown.equal(adapter.sample("teacher", rest, seen[2], cond))
