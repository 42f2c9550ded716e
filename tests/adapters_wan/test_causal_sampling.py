"""Causal roles through the sampler: chunk by chunk, by the same SamplerSpec as everybody."""

from __future__ import annotations

import itertools

import pytest
import torch
from attrs import evolve
from diffusers import UniPCMultistepScheduler
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_diffusers.sampling import sampler as sampling
from distill_protocols import (
    ChunkCall,
    CleanPast,
    Condition,
    ConditioningError,
    ContractError,
    ExportRequest,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    StopRequested,
)
from wan_variants import VARIANTS

ODE = SamplerSpec(steps=3, shift=3.0)
STOCHASTIC = SamplerSpec(steps=2, timesteps=(1000, 700), stochastic=True)
GUIDED = SamplerSpec(steps=2, shift=3.0, guidance=2.5)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch, seed=1):
    return Condition({"text": normal(batch, 6, 16, seed=seed)})


@pytest.fixture(scope="module")
def make(pipeline_template):
    def make(**numbers):
        config = WanPipelineConfig(
            num_frames=25, height=32, width=48, max_sequence_length=6,
            causal=CausalConfig(roles=("student",), **numbers),
        )  # fmt: skip
        source = str(pipeline_template)
        specs = [RoleSpec(name=n, path=source, trainable=False) for n in ("student", "teacher")]
        bundle = PLUGIN.load(specs, config, device=torch.device("cpu"))
        return PLUGIN.adapter(bundle, config, source=source), bundle

    return make


@pytest.fixture(scope="module")
def adapter(make):
    return make(chunk_frames=3, first_frame_alone=True, window_frames=7, sink_frames=1)[0]


@pytest.fixture
def noise():
    return normal(2, 4, 7, 4, 6)


@pytest.fixture
def calls(adapter):
    """(frames, t, batch) of each call of the student's transformer."""
    calls_made = []
    hook = (
        adapter._bundle["student"]
        .modules["transformer"]
        .register_forward_pre_hook(
            lambda m, args, kwargs: calls_made.append(
                (kwargs["hidden_states"].shape[2], float(kwargs["timestep"][0]))
            ),
            with_kwargs=True,
        )
    )
    yield calls_made
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("spec", [ODE, GUIDED])
def test_a_clip_by_hand(adapter, noise, spec):
    """Euler on each chunk through ``forward``, the past stored at t = 0 from x0 itself. Exact."""
    adapter.clear_caches("student")
    neg = text(1, seed=3)
    out = []
    for chunk in adapter.chunks("student"):
        x = noise[:, :, chunk.span]
        sigmas = torch.tensor([*spec.sigmas(), 0.0])
        for s, after in itertools.pairwise(sigmas):
            v = adapter.forward(
                "student", x, (1000 * s).expand(2), text(2), neg_cond=neg, cfg=spec.guidance,
                caches=ChunkCall(first_frame=chunk.first),
            )  # fmt: skip
            x = x + (after - s) * v
        adapter.forward(
            "student", x, torch.zeros(2), text(2), neg_cond=neg, cfg=spec.guidance,
            caches=ChunkCall(first_frame=chunk.first, store=True),
        )  # fmt: skip
        out.append(x)
    adapter.clear_caches("student")
    sampled = adapter.sample("student", spec, noise, text(2), neg_cond=neg)
    assert torch.equal(sampled, torch.cat(out, dim=2))
    bidirectional = adapter.sample("teacher", spec, noise, text(2), neg_cond=neg)
    assert sampled.shape == bidirectional.shape
    assert not torch.allclose(sampled, bidirectional, atol=1e-3)


@torch.no_grad()
def test_a_clip_by_unipc_by_hand(adapter, noise):
    """Each chunk has a scheduler of its own: what it keeps of one must not reach the next."""
    spec = SamplerSpec(steps=3, shift=3.0, guidance=2.5, solver="unipc")
    neg, out = text(1, seed=3), []
    for chunk in adapter.chunks("student"):
        call = ChunkCall(first_frame=chunk.first)
        options = {"neg_cond": neg, "cfg": spec.guidance}
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        scheduler.set_timesteps(3)
        x = noise[:, :, chunk.span]
        for t in scheduler.timesteps:
            times = t.float().expand(2)
            v = adapter.forward("student", x, times, text(2), caches=call, **options)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        store = evolve(call, store=True)
        adapter.forward("student", x, torch.zeros(2), text(2), caches=store, **options)
        out.append(x)
    adapter.clear_caches("student")
    sampled = adapter.sample("student", spec, noise, text(2), neg_cond=neg)
    assert torch.equal(sampled, torch.cat(out, dim=2))


def test_each_call_is_made_once_and_the_last_chunk_is_not_stored(adapter, noise, calls):
    adapter.sample("student", ODE, noise, text(2))
    walk = [pytest.approx(1000 * s) for s in ODE.sigmas()]
    expected = []
    for frames in (1, 3, 3):
        expected += [(frames, t) for t in (*walk, 0.0)]
    assert calls == expected[:-1]
    assert adapter.cached_bytes("student") == 0


def drawn(seed, rows=2):
    return RowGenerators.seeded(seed, "test", range(rows))


def test_context_noise(adapter, noise, calls):
    """None is none: t = 0 and no draw. Some: that t, and a clip of its own."""
    one = adapter.sample("student", STOCHASTIC, noise, text(2), generators=drawn(1))
    assert [t for _, t in calls].count(0.0) == 2
    calls.clear()
    spec = evolve(STOCHASTIC, context_noise=100.0)
    noised = adapter.sample("student", spec, noise, text(2), generators=drawn(1))
    assert [t for _, t in calls].count(100.0) == 2
    assert torch.equal(one[:, :, :1], noised[:, :, :1])  # it has no past
    assert not torch.allclose(one[:, :, 1:], noised[:, :, 1:], atol=1e-3)
    for wrong, message in [(1000.0, "nothing of the past"), (-1.0, r"\[0, 1000\)")]:
        with pytest.raises(ValueError, match=message):
            evolve(ODE, context_noise=wrong)
    with pytest.raises(ContractError, match="needs generators"):
        adapter.sample("student", evolve(ODE, context_noise=50.0), noise, text(2))


def test_the_past_stores_the_clean_chunk_or_its_noised_form():
    """The sampler alone, with a velocity that a test can compute: x0 = x - s (x - 1) ..."""
    stored = []

    def velocity(x, t, first_frame, store):
        if store:
            stored.append((x.clone(), t.clone(), first_frame))
        return x - 1

    noises = [normal(2, 4, n, 4, 6, seed=n) for n in (1, 3, 2)]
    clean = list(sampling.sample_chunks(velocity, SamplerSpec(steps=2), iter(noises)))
    assert [first for _, _, first in stored] == [0, 1]
    for (x, t, _), x0 in zip(stored, clean, strict=False):
        assert torch.equal(x, x0)
        assert t.tolist() == [0.0, 0.0]
    stored.clear()
    noisy = SamplerSpec(steps=2, context_noise=250.0)
    again = list(sampling.sample_chunks(velocity, noisy, iter(noises), drawn(4)))
    generators = drawn(4)
    for (x, t, _), x0 in zip(stored, again, strict=False):
        eps = generators.normal(x0.shape[1:])
        assert torch.allclose(x, 0.75 * x0 + 0.25 * eps, atol=1e-6)
        assert t.tolist() == [250.0, 250.0]


def test_a_stream_gives_each_chunk_before_it_asks_for_the_next(adapter, noise, calls):
    asked = []

    def noises():
        for chunk in adapter.chunks("student", 7):
            asked.append(chunk.first)
            yield noise[:, :, chunk.span]

    stream = adapter.stream("student", ODE, noises(), text(2))
    full = adapter.sample("student", ODE, noise, text(2))
    calls.clear()
    first = next(stream)
    assert asked == [0]
    assert len(calls) == ODE.steps
    parts = [first, next(stream)]
    assert asked == [0, 1]
    assert adapter.cached_bytes("student") > 0
    stream.close()  # a viewer left
    assert adapter.cached_bytes("student") == 0
    assert torch.equal(torch.cat(parts, dim=2), full[:, :, :4])


def test_streams_and_a_rollout_side_by_side(adapter, noise):
    """Three videos of one role in the making, chunk about."""
    other = normal(2, 4, 7, 4, 6, seed=9)
    alone = [adapter.sample("student", ODE, n, text(2)) for n in (noise, other)]
    chunks = adapter.chunks("student")
    streams = [
        adapter.stream("student", ODE, [n[:, :, c.span] for c in chunks], text(2))
        for n in (noise, other)
    ]
    adapter.clear_caches("student")
    clips = []
    for chunk, *parts in zip(chunks, *streams, strict=True):
        clips.append(parts)
        with torch.no_grad():  # a method's rollout: refused if a stream had touched its past
            adapter.forward(
                "student", noise[:, :, chunk.span], torch.zeros(2), text(2, seed=4),
                caches=ChunkCall(first_frame=chunk.first, store=True),
            )  # fmt: skip
    for expected, parts in zip(alone, zip(*clips, strict=True), strict=True):
        assert torch.equal(expected, torch.cat(parts, dim=2))
    adapter.clear_caches("student")


@torch.no_grad()
def test_a_stream_goes_on_beyond_the_models_positions(adapter):
    """61 frames; the model has 16 positions, the clip of this run 7 frames."""
    frames = [normal(1, 4, c.frames, 4, 6, seed=c.first) for c in adapter.chunks("student", 61)]
    seen = [chunk.shape[2] for chunk in adapter.stream("student", ODE, frames, text(1))]
    assert seen == [1] + [3] * 20
    with pytest.raises(ContractError, match=r"\[B, 4, T, 4, 6\]"):
        next(adapter.stream("student", ODE, [normal(1, 4, 1, 4, 8)], text(1)))
    with pytest.raises(ContractError, match="no chunk"):
        next(adapter.stream("student", ODE, [normal(1, 4, 3, 4, 6)], text(1)))


def test_a_stop_is_asked_for_before_each_call_and_leaves_no_cache(adapter, noise, calls):
    class Poll:
        def __init__(self, stop_at):
            self.left = stop_at

        def __call__(self):
            self.left -= 1
            if self.left < 0:
                raise StopRequested("asked to")

    patient = Poll(1000)
    adapter.sample("student", ODE, noise, text(2), poll=patient)
    assert 1000 - patient.left == len(calls) == 3 * ODE.steps + 2
    with pytest.raises(StopRequested):
        adapter.sample("student", ODE, noise, text(2), poll=Poll(6))
    assert adapter.cached_bytes("student") == 0


def test_a_sample_does_not_depend_on_its_batch(adapter, noise):
    spec = SamplerSpec(steps=2, shift=3.0, guidance=2.5, stochastic=True, context_noise=50.0)
    neg = {"neg_cond": text(1, seed=3)}
    both = adapter.sample("student", spec, noise, text(2), generators=drawn(6), **neg)
    for i in range(2):
        row = slice(i, i + 1)
        own = RowGenerators.seeded(6, "test", [i])
        one = adapter.sample("student", spec, noise[row], text(2)[row], generators=own, **neg)
        assert torch.allclose(one, both[i : i + 1], atol=1e-5)


def test_an_export_says_that_its_role_is_causal(make, pipeline_template, tmp_path):
    adapter, bundle = make(chunk_frames=3)
    exporter = PLUGIN.exporter(adapter._config, source=str(pipeline_template))
    for name in ("student", "teacher"):
        record = exporter.export(
            RoleSpec(name=name, path=str(pipeline_template), trainable=False),
            bundle[name].weight_sources(), tmp_path / name, ExportRequest(sampler=ODE),
        )  # fmt: skip
        causal_notes = [note for note in record["notes"] if "chunk by chunk" in note]
        assert len(causal_notes) == (name == "student")
        assert (record["causal"] or {}).get("chunk_frames") == (3 if name == "student" else None)


# -- with the other kinds of Wan ------------------------------------------------------------------


@pytest.fixture
def build(folder_of):
    def build(name, **numbers):
        config = WanPipelineConfig(
            num_frames=25, height=32, width=48,
            max_sequence_length=VARIANTS[name].config.max_sequence_length,
            causal=CausalConfig(roles=("student",), **numbers),
        )  # fmt: skip
        source = str(folder_of(name))
        specs = [RoleSpec(name=n, path=source, trainable=False) for n in ("student", "teacher")]
        bundle = PLUGIN.load(specs, config, device=torch.device("cpu"))
        return PLUGIN.adapter(bundle, config, source=source)

    return build


@torch.no_grad()
def test_each_expert_sees_a_past_of_its_own(build, noise):
    """A chunk that is stored at t = 0, the low expert's, is past for the high one too: both give
    what they give beside the whole clean past at once."""
    adapter, clean = build("t2v-experts", chunk_frames=3), normal(2, 4, 7, 4, 6, seed=4)
    parts = {950.0: [], 500.0: []}
    for chunk in adapter.chunks("student"):
        for t, prediction in parts.items():
            call = ChunkCall(first_frame=chunk.first)
            x = noise[:, :, chunk.span]
            prediction.append(
                adapter.forward("student", x, torch.full((2,), t), text(2), caches=call)
            )
        adapter.forward(
            "student", clean[:, :, chunk.span], torch.zeros(2), text(2),
            caches=ChunkCall(first_frame=chunk.first, store=True),
        )  # fmt: skip
    for t, prediction in parts.items():
        full = adapter.forward(
            "student", noise, torch.full((2,), t), text(2), caches=CleanPast(latents=clean)
        )
        assert torch.allclose(torch.cat(prediction, dim=2), full, atol=1e-5), t
    adapter.clear_caches("student")
    assert adapter.cached_bytes("student") == 0


@torch.no_grad()
@pytest.mark.parametrize("weights", [(2.5, 1.0), (0.0, 1.0), (2.5, 1.5)])
def test_experts_with_a_guidance_each_are_sampled_by_chunks(build, noise, weights):
    adapter, neg = build("t2v-experts", chunk_frames=3), text(1, seed=3)
    spec = SamplerSpec(steps=4, shift=5.0, guidance=weights[0], guidance_2=weights[1])
    out = []
    for chunk in adapter.chunks("student"):
        x = noise[:, :, chunk.span]
        for s, after in itertools.pairwise(torch.tensor([*spec.sigmas(), 0.0])):
            v = adapter.forward(
                "student", x, (1000 * s).expand(2), text(2), neg_cond=neg,
                cfg=weights[bool(1000 * s < 875)], caches=ChunkCall(first_frame=chunk.first),
            )  # fmt: skip
            x = x + (after - s) * v
        for w in (0.0, 1.0):
            adapter.forward(
                "student", x, torch.zeros(2), text(2), neg_cond=neg, cfg=w,
                caches=ChunkCall(first_frame=chunk.first, store=True),
            )  # fmt: skip
        out.append(x)
    adapter.clear_caches("student")
    sampled = adapter.sample("student", spec, noise, text(2), neg_cond=neg)
    assert torch.equal(sampled, torch.cat(out, dim=2))


PICTURED = ["i2v-2.1", "i2v-experts", "ti2v"]


def random_condition(name, batch, frames=7, seed=1):
    """Build a random condition of the kind that the variant reads."""
    tensors = {"text": normal(batch, VARIANTS[name].config.max_sequence_length, 16, seed=seed)}
    if VARIANTS[name].embeds:
        tensors["image_embeds"] = normal(batch, 17, 20, seed=seed + 1)
    count = 1 if name == "ti2v" else frames
    tensors["image_latents"] = normal(batch, 4, count, 4, 6, seed=seed + 2)
    return Condition(tensors)


def call_by_chunks(adapter, x, t, cond, clean):
    """Call the role with each chunk after the clean chunks before it."""
    out = []
    for chunk in adapter.chunks("student", x.shape[2]):
        call = ChunkCall(first_frame=chunk.first)
        out.append(adapter.forward("student", x[:, :, chunk.span], t, cond, caches=call))
        adapter.forward(
            "student", clean[:, :, chunk.span], torch.zeros_like(t), cond,
            caches=ChunkCall(first_frame=chunk.first, store=True),
        )  # fmt: skip
    adapter.clear_caches("student")
    return torch.cat(out, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [{"chunk_frames": 2}, {"first_frame_alone": True}])
@pytest.mark.parametrize("name", PICTURED)
def test_each_chunk_reads_its_own_part_of_a_picture(build, name, numbers):
    """Chunk by chunk it is what it is beside the whole clean past at once (1e-5), and it does not
    change when the picture's latents of later frames do."""
    batch = 2
    adapter, t = build(name, **numbers), torch.full((batch,), 500.0)
    cond, x = random_condition(name, batch), normal(batch, 4, 7, 4, 6)
    clean = normal(batch, 4, 7, 4, 6, seed=9)
    rolled = call_by_chunks(adapter, x, t, cond, clean)
    full = adapter.forward("student", x, t, cond, caches=CleanPast(latents=clean))
    assert torch.allclose(rolled, full, atol=1e-5)
    if name == "ti2v":
        other = Condition(dict(cond.tensors) | {"image_latents": normal(batch, 4, 1, 4, 6)})
        assert not torch.allclose(call_by_chunks(adapter, x, t, other, clean), rolled, atol=1e-3)
        return
    changed = cond.tensors["image_latents"].clone()
    start = adapter.chunks("student", 7)[1].first
    changed[:, :, start:] += 1
    other = Condition(dict(cond.tensors) | {"image_latents": changed})
    again = call_by_chunks(adapter, x, t, other, clean)
    assert torch.equal(again[:, :, :start], rolled[:, :, :start])
    assert not torch.allclose(again[:, :, start:], rolled[:, :, start:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", PICTURED)
def test_a_clip_of_one_chunk_is_the_bidirectional_one(build, name):
    """Another path through the adapter, without a mask or a cache."""
    adapter, x = build(name, chunk_frames=7), normal(2, 4, 7, 4, 6)
    spec, cond = SamplerSpec(steps=2, shift=3.0), random_condition(name, 2)
    t = torch.full((2,), 500.0)
    for given in (cond, random_condition(name, 2, seed=20)):
        plain = adapter.forward("teacher", x, t, given, fwd_pred_type="x0")
        chunk = ChunkCall(first_frame=0)
        one = adapter.forward("student", x, t, given, fwd_pred_type="x0", caches=chunk)
        assert torch.allclose(one, plain, atol=1e-5)
    sampled = adapter.sample("student", spec, x, cond)
    assert torch.allclose(sampled, adapter.sample("teacher", spec, x, cond), atol=1e-5)
    rolled = adapter.rollout("student", spec, x, cond, exit_steps=[1])
    assert torch.equal(rolled, sampled)
    if name == "ti2v":
        assert torch.equal(sampled[:, :, :1], cond.tensors["image_latents"])


@torch.no_grad()
def test_a_first_frame_begins_a_video_longer_than_training(build):
    adapter, x = build("ti2v", first_frame_alone=True), normal(2, 4, 13, 4, 6)
    spec, cond = SamplerSpec(steps=2, shift=3.0), random_condition("ti2v", 2)
    chunks = adapter.chunks("student", 13)
    parts = adapter.stream("student", spec, (x[:, :, c.span] for c in chunks), cond)
    video = torch.cat(list(parts), dim=2)
    clip = adapter.sample("student", spec, x[:, :, :7], cond)
    assert torch.equal(video[:, :, :1], cond.tensors["image_latents"])
    assert torch.allclose(video[:, :, :7], clip, atol=1e-5)
    assert (video[:, :, 7:] - x[:, :, 7:]).abs().mean() > 0.01
    # Where the picture has a latent for each frame of a clip, those of a longer video lack theirs.
    adapter, cond = build("i2v-2.1", first_frame_alone=True), random_condition("i2v-2.1", 2)
    with pytest.raises(ConditioningError, match="longer than they are"):
        list(adapter.stream("student", spec, (x[:, :, c.span] for c in chunks), cond))


@torch.no_grad()
def test_pictures_that_do_not_go_with_a_video_are_refused(build):
    adapter, t = build("i2v-2.1", chunk_frames=3), torch.full((1,), 500.0)
    cond, x = random_condition("i2v-2.1", 1), normal(1, 4, 3, 4, 6)
    adapter.forward("student", x, t, cond, caches=ChunkCall(first_frame=0, store=True))
    other = Condition(dict(cond.tensors) | {"image_latents": normal(1, 4, 7, 4, 6)})
    with pytest.raises(ContractError, match="the condition is another one"):
        adapter.forward("student", x, t, other, caches=ChunkCall(first_frame=3))
    for first in (3, 6):
        adapter.clear_caches("student")
        short = Condition(dict(cond.tensors) | {"image_latents": normal(1, 4, first, 4, 6)})
        with pytest.raises(ConditioningError, match="longer than they are"):
            call_by_chunks(adapter, normal(1, 4, 9, 4, 6), t, short, normal(1, 4, 9, 4, 6))


def test_a_causal_role_has_no_states_of_a_full_clip(adapter, noise):
    with pytest.raises(ContractError, match="'student' is causal and samples chunk by chunk"):
        adapter.sample("student", ODE, noise, text(2), on_step=lambda step, x: None)
