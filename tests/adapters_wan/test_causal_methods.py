"""Self-Forcing, CausVid and causal finetunes on a real (tiny) causal Wan.

Self-Forcing's formula uses no caches and no line of the adapter's causal code: a stock transformer
is called on [clean; noisy] clips of twice the length, with attention by ``causal_reference``.
Tolerances: outputs 1e-5 absolute; gradients 2e-4 of their norm.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from attrs import evolve, frozen
from causal_reference import ReferenceProcessor, seen_beside_clean
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_methods import (
    CausVidConfig,
    CausVidMethod,
    FinetuneConfig,
    FinetuneMethod,
    SelfForcingConfig,
    SelfForcingMethod,
    TimeSampling,
)
from distill_protocols import (
    Batch,
    CapabilityError,
    CleanPast,
    Condition,
    ContractError,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
    StopRequested,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TEXT, GRID = (6, 16), (2, 3)
SHAPE = (4, 5, 4, 6)
"""Of a clip of 17 frames, 32 x 48 pixels."""
METHODS = {
    SelfForcingConfig: SelfForcingMethod,
    CausVidConfig: CausVidMethod,
    FinetuneConfig: FinetuneMethod,
}
STUDENTS_TURN, CRITICS_TURN = 2, 1
SPEC = SamplerSpec(steps=3, timesteps=(1000, 800, 400), stochastic=True)
MATCHING = {"generator_update_interval": 2, "real_score_guidance_scale": 2.0}
some = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Conditioning:
    def negative(self):
        return Condition({"text": torch.full((1, *TEXT), 0.3)})

    def encode(self, prompts):
        raise NotImplementedError


@frozen(repr=False)
class Build:
    """Makes methods, of roles that are loaded once a variant."""

    folder_of: object
    made: dict

    def __call__(self, config, *, variant="t2v", causal=None, seed=0):
        source = self.folder_of(variant)
        section = None if causal is None else CausalConfig(roles=("student",), **causal)
        pipeline = WanPipelineConfig(
            num_frames=17, height=32, width=48, max_sequence_length=6, causal=section
        )
        key = variant, section is None
        if key not in self.made:
            specs = [
                RoleSpec(name=name, path=source, trainable=name != "teacher")
                for name in ("student", "teacher", "critic")
            ]
            self.made[key] = PLUGIN.load(specs, pipeline, device=torch.device("cpu"))
            generator = torch.Generator().manual_seed(3)
            for module in self.made[key].by_module("modules").values():
                for parameter in module.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data.add_(noise, alpha=0.05)
        bundle = self.made[key]
        adapter = PLUGIN.adapter(bundle, pipeline, source=source)
        return METHODS[type(config)](
            bundle, adapter, config, conditioning=Conditioning(), streams=RandomStreams(seed)
        )


@pytest.fixture(scope="module")
def build(folder_of):
    return Build(folder_of, {})


def batch_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        latents=torch.randn(size, *SHAPE, generator=generator),
        cond=Condition({"text": torch.randn(size, *TEXT, generator=generator)}),
        ids=tuple(map(str, range(size))),
    )


def part(batch, start, stop):
    rows = slice(start, stop)
    return Batch(latents=batch.latents[rows], cond=batch.cond[rows], ids=batch.ids[rows])


@contextmanager
def calls_of(method, role):
    """(frames, first t, with gradient) of each call of a role's transformers."""
    seen, hooks = [], []
    for module in method.bundle[role].modules.values():
        hooks.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(
                    (
                        kwargs["hidden_states"].shape[2],
                        round(float(kwargs["timestep"].flatten()[0]), 2),
                        torch.is_grad_enabled() and any(p.requires_grad for p in m.parameters()),
                    )
                ),
                with_kwargs=True,
            )
        )
    yield seen
    for hook in hooks:
        hook.remove()


@contextmanager
def checkpointing(method, enabled):
    modules = method.bundle["student"].modules.values()
    for module in modules:
        if enabled:
            module.enable_gradient_checkpointing()
    yield
    for module in modules:
        module.disable_gradient_checkpointing()


def take_gradient(method, role="student"):
    """Take a role's gradient away and return it as one vector; None if it has none."""
    gradients = []
    for module in method.bundle[role].modules.values():
        gradients += [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        module.zero_grad(set_to_none=True)
    return torch.cat(gradients) if gradients else None


def assert_close(actual, expected):
    assert expected.norm() > 0
    assert (actual - expected).norm() < 2e-4 * expected.norm()


# -- Self-Forcing ---------------------------------------------------------------------------------

causals = st.sampled_from(
    [
        {"chunk_frames": 1},
        {"chunk_frames": 2, "first_frame_alone": True},
        {"chunk_frames": 3},
        {"chunk_frames": 5},
        {"chunk_frames": 1, "window_frames": 3, "sink_frames": 1},
        {"chunk_frames": 2, "first_frame_alone": True, "window_frames": 4},
    ]
)
specs = st.builds(
    SamplerSpec,
    steps=st.just(3),
    timesteps=st.just((1000.0, 800.0, 400.0)),
    stochastic=st.booleans(),
    context_noise=st.sampled_from([0.0, 150.0]),
)


def draw_exit_steps(streams, config, count):
    """Draw the exit steps that the method draws, by the names of its purposes."""
    if config.last_step_only:
        return [config.student_sampler.steps - 1] * count
    generator = streams.get("self_forcing.student.exit_step", shared=True)
    times = 1 if config.same_step_across_chunks else count
    drawn = [int(torch.randint(3, (), generator=generator)) for _ in range(times)]
    return drawn * (count // times)


def reference(method, causal, frames):
    """Return the student in a stock transformer: (past, its t, x_t, t [B, T], text) -> v, without
    gradient through keys and values of the past; and that transformer."""
    names = {"chunk_frames": "size", "first_frame_alone": "alone"} | {
        "window_frames": "window", "sink_frames": "sink"
    }  # fmt: skip
    seen = seen_beside_clean(frames, **{names[key]: value for key, value in causal.items()})
    stock = copy.deepcopy(method.bundle["teacher"].modules["transformer"])
    stock.load_state_dict(method.bundle["student"].modules["transformer"].state_dict())
    for block in stock.blocks:
        block.attn1.set_processor(ReferenceProcessor(seen, GRID, detached=frames))

    def velocity(past, past_t, x_t, t, cond):
        v = stock(
            hidden_states=torch.cat([past, x_t], dim=2),
            timestep=torch.cat([torch.full_like(t, past_t), t], dim=1).repeat_interleave(6, dim=1),
            encoder_hidden_states=cond.tensors["text"],
            return_dict=False,
        )[0]
        return v[:, :, frames:]

    return velocity, stock.requires_grad_(True)


def gradient_by_formula(method, causal, batch, exit_steps, frames, learned):
    """Return the clip and, in the student's weights, the gradient of ``method``'s student turn."""
    adapter, config, streams = method.adapter, method.config, RandomStreams(0)
    velocity, stock = reference(method, causal, frames)
    spec, size = config.student_sampler, len(batch)
    channels, clip, height, width = SHAPE
    noise = streams.rows("self_forcing.student.rollout", size).normal(
        (channels, frames, height, width)
    )
    fresh = streams.rows("self_forcing.student.rollout.fresh", size)
    past, past_t = torch.zeros_like(noise), spec.context_noise
    inputs, times, clean = [], [], torch.zeros_like(noise)
    chunks = adapter.chunks("student", frames)

    def called(x_t, t, chunk):
        """x0 of one chunk, the rest of the clip being whatever it is."""
        full = torch.zeros_like(noise)
        full[:, :, chunk.span] = x_t
        v = velocity(past, past_t, full, torch.full((size, frames), t), batch.cond)
        return x_t - t / 1000 * v[:, :, chunk.span]

    with torch.no_grad():
        for chunk, k in zip(chunks, exit_steps, strict=True):
            x = noise[:, :, chunk.span]
            for t, after in zip(spec.timesteps[:k], spec.timesteps[1:], strict=False):
                x0 = called(x, t, chunk)
                s, s_after = t / 1000, after / 1000
                if spec.stochastic:
                    x = (1 - s_after) * x0 + s_after * fresh.normal(x.shape[1:])
                else:
                    x = x + (s_after - s) * (x - x0) / s
            inputs.append(x)
            times.append(torch.full((size, chunk.frames), spec.timesteps[k]))
            x0 = called(x, spec.timesteps[k], chunk)
            clean[:, :, chunk.span] = x0
            if past_t and chunk != chunks[-1]:
                eps = fresh.normal(x0.shape[1:])
                x0 = (1 - past_t / 1000) * x0 + past_t / 1000 * eps
            past[:, :, chunk.span] = x0

    x_t, t = torch.cat(inputs, dim=2), torch.cat(times, dim=1)
    s = (t / 1000)[:, None, :, None, None]
    x = x_t - s * velocity(past, past_t, x_t, t, batch.cond)
    torch.testing.assert_close(x.detach(), clean, atol=1e-5, rtol=0)

    with torch.no_grad():
        seen = x[:, :, -clip:]
        u = streams.rows("self_forcing.student.t", size).uniform()
        t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
        s = (t / 1000)[:, None, None, None, None]
        noised = (1 - s) * seen + s * streams.rows("self_forcing.student.noise", size).normal(SHAPE)
        fake = noised - s * adapter.forward("critic", noised, t, batch.cond)
        c = adapter.forward("teacher", noised, t, batch.cond)
        negative = Conditioning().negative().expand(size)
        n = adapter.forward("teacher", noised, t, negative)
        real = noised - s * (n + 2.0 * (c - n))
        counted = torch.ones_like(seen)
        if frames > clip:
            counted[:, :, 0] = 0
        apart = ((seen - real).abs() * counted).flatten(1).sum(1) / counted[0].sum()
        g = counted * (fake - real) / apart[:, None, None, None, None] / counted.sum()
        reach = torch.zeros_like(x)
        reach[:, :, -clip:] = g
        for chunk in chunks:
            if chunk.first < frames - learned:
                reach[:, :, chunk.span] = 0
    x.backward(reach)
    return seen, torch.cat([p.grad.flatten() for p in stock.parameters()])


@given(
    causals, specs, st.sampled_from([1, 2]), st.booleans(), st.booleans(),
    st.sampled_from([1, 3, 21, None]), st.integers(0, 2),
)  # fmt: skip
@settings(some, max_examples=6)
def test_a_step_is_its_formula_without_caches(
    build, causal, spec, size, same, checkpointed, gradient_frames, longer
):
    """The cached rollout is one block-causal call of the whole clip beside its own clean chunks,
    and its gradient that of this call with the past detached: nothing leaks from chunk to chunk,
    with activation checkpointing or without."""
    chunk = causal["chunk_frames"]
    lead = bool(causal.get("first_frame_alone"))
    ends = [lead + chunk * i for i in range(1, 20)]
    lengths = [SHAPE[1], *(n for n in ends if SHAPE[1] < n <= 8)]  # twice: 16 positions
    frames = lengths[min(longer, len(lengths) - 1)]
    longer = frames > SHAPE[1]
    gradient_frames = gradient_frames and max(chunk, gradient_frames)
    config = SelfForcingConfig(
        **MATCHING, student_sampler=spec, same_step_across_chunks=same,
        gradient_frames=gradient_frames, rollout_frames=(frames, frames) if longer else None,
    )  # fmt: skip
    method, batch = build(config, causal=causal), batch_of(size)
    count = len(method.adapter.chunks("student", frames))
    with checkpointing(method, checkpointed):
        result = method.single_train_step(batch, STUDENTS_TURN)
        result.loss_map["total_loss"].backward()
    actual = take_gradient(method)
    assert take_gradient(method, "critic") is None
    learned = min(SHAPE[1], gradient_frames or SHAPE[1])
    exit_steps = draw_exit_steps(RandomStreams(0), config, count)
    seen, expected = gradient_by_formula(method, causal, batch, exit_steps, frames, learned)
    torch.testing.assert_close(result.outputs["student_x0"], seen.detach(), atol=1e-5, rtol=0)
    assert float(result.outputs["exit_step"]) == pytest.approx(sum(exit_steps) / count)
    assert_close(actual, expected)


@given(causals, specs, st.sampled_from([1, 2]), st.booleans(), st.data())
@some
def test_a_chunks_loss_reaches_its_own_call_and_no_other(
    build, causal, spec, size, checkpointed, data
):
    method, batch = build(SelfForcingConfig(**MATCHING), causal=causal), batch_of(size)
    chunks = method.adapter.chunks("student")
    exit_steps = data.draw(st.tuples(*[st.integers(0, 2)] * len(chunks)))
    leaves = []

    def replace(module, args, kwargs):
        stores = float(kwargs["timestep"].flatten()[0]) == spec.context_noise
        if torch.is_grad_enabled() and not stores:
            leaves.append(kwargs["hidden_states"].detach().requires_grad_())
            kwargs["hidden_states"] = leaves[-1]
        return args, kwargs

    transformer = method.bundle["student"].modules["transformer"]
    # Before the causal switch's own hook, so that a leaf is what a call is given.
    hook = transformer.register_forward_pre_hook(replace, with_kwargs=True, prepend=True)
    try:
        with checkpointing(method, checkpointed):
            x = method.adapter.rollout(
                "student", spec, batch.latents, batch.cond, exit_steps=exit_steps,
                generators=RandomStreams(0).rows("x", size),
            )  # fmt: skip
            assert len(leaves) == len(chunks)
            for i, chunk in enumerate(chunks):
                loss = x[:, :, chunk.span].square().sum()
                gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                reached = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
                assert reached == [j == i for j in range(len(chunks))]
    finally:
        hook.remove()


@pytest.mark.parametrize("same", [True, False])
def test_exit_steps_are_drawn_for_all_chunks_or_for_each(build, same):
    config = SelfForcingConfig(**MATCHING, student_sampler=SPEC, same_step_across_chunks=same)
    method, seen = build(config, causal={"chunk_frames": 1}), set()
    for _ in range(8):
        with calls_of(method, "student") as calls:
            method.single_train_step(batch_of(1), STUDENTS_TURN)
        walk = list(SPEC.timesteps)
        exit_steps, steps = [], []
        for frames, t, learns in calls:
            assert frames == 1
            if t == 0:
                continue
            assert t == walk[len(steps)]
            steps.append(t)
            if learns:
                exit_steps.append(len(steps) - 1)
                steps = []
        assert [t for _, t, _ in calls].count(0.0) == 4  # each chunk but the last becomes past
        assert len(exit_steps) == 5
        seen.add(tuple(exit_steps))
    assert len(seen) > 2
    assert all((len(set(exit_steps)) == 1) == same for exit_steps in seen)


def test_the_last_step_alone(build):
    config = SelfForcingConfig(**MATCHING, student_sampler=SPEC, last_step_only=True)
    method = build(config, causal={"chunk_frames": 3})
    result = method.single_train_step(batch_of(1), STUDENTS_TURN)
    assert float(result.outputs["exit_step"]) == 2
    assert config.update_share("student", 0.0, 500.0) == 1
    assert config.update_share("student", 500.0, 1000.0) == 0


def test_gradient_reaches_the_last_frames_alone(build):
    """Chunks [1, 2, 2], the last 3 frames: what begins before frame 2 is called without."""
    config = SelfForcingConfig(
        **MATCHING, student_sampler=evolve(SPEC, steps=1, timesteps=(1000,)), gradient_frames=3
    )
    method = build(config, causal={"chunk_frames": 2, "first_frame_alone": True})
    with calls_of(method, "student") as calls:
        method.single_train_step(batch_of(1), STUDENTS_TURN)
    assert [(n, learns) for n, t, learns in calls if t] == [(1, False), (2, False), (2, True)]


def test_longer_rollouts_are_scored_by_their_last_clip(build):
    spec = evolve(SPEC, steps=1, timesteps=(1000,))
    config = SelfForcingConfig(**MATCHING, student_sampler=spec, rollout_frames=(5, 10))
    method, lengths = build(config, causal={"chunk_frames": 2, "first_frame_alone": True}), set()
    for iteration in [STUDENTS_TURN] * 5 + [CRITICS_TURN] * 5:
        with calls_of(method, "student") as calls, calls_of(method, "critic") as judged:
            result = method.single_train_step(batch_of(1), iteration)
        lengths.add(sum(n for n, t, _ in calls if t))
        assert {n for n, _, _ in judged} == {5}
        assert result.outputs["student_x0"].shape == (1, *SHAPE)
        learned = [learns for _, t, learns in calls if t]
        if iteration == CRITICS_TURN:
            assert not any(learned)
        else:
            assert learned[-2:] == [True, True]
            assert sum(learned) == (3 if len(learned) == 3 else 2)
    assert lengths == {5, 7, 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_frames": (4, 9)}, r"rollout_frames \[4, 9\].*clips of 5 latent frames"),
        ({"rollout_frames": (10, 10)}, r"end at frames \[1, 3, 5, 7, 9\]"),
        ({"gradient_frames": 1}, "gradient_frames 1 is less than the 2 latent frames"),
    ],
)
def test_numbers_that_do_not_go_with_the_chunks_are_refused(build, options, message):
    with pytest.raises(ContractError, match=f"(?s){message}"):
        build(
            SelfForcingConfig(**MATCHING, **options),
            causal={"chunk_frames": 2, "first_frame_alone": True},
        )


def test_caches_are_empty_after_a_step_a_stop_and_an_error(build):
    config = SelfForcingConfig(**MATCHING, student_sampler=SPEC, last_step_only=True)
    method, batch = build(config, causal={"chunk_frames": 1}), batch_of(2)
    alive, stop_at, fail_at = [], 0, 0
    transformer = method.bundle["student"].modules["transformer"]

    def note(module, args):
        alive.append(method.adapter.cached_bytes("student"))
        if len(alive) == stop_at:
            method.stop.request("preempted")
        if len(alive) == fail_at:
            raise ArithmeticError("no number")

    hook = transformer.register_forward_pre_hook(note)
    try:
        method.single_train_step(batch, STUDENTS_TURN)
        assert len(alive) == 5 * 3 + 4
        assert max(alive) > 0
        assert method.adapter.cached_bytes("student") == 0
        for error in (StopRequested, ArithmeticError):
            alive.clear()
            stop_at, fail_at = (9, 0) if error is StopRequested else (0, 9)
            method = build(config, causal={"chunk_frames": 1})
            with pytest.raises(error):
                method.single_train_step(batch, STUDENTS_TURN)
            assert len(alive) == 9
            assert alive[-1] > 0
            assert method.adapter.cached_bytes("student") == 0
    finally:
        hook.remove()


def test_two_experts_learn_by_turns_and_the_other_takes_the_steps_before(build):
    """Levels 1000 and 950 are the high expert's, 400 the low one's."""
    spec = SamplerSpec(steps=3, timesteps=(1000, 950, 400), stochastic=True)
    config = SelfForcingConfig(**MATCHING, student_sampler=spec, same_step_across_chunks=False)
    method = build(config, variant="t2v-experts", causal={"chunk_frames": 2})
    turns = set()
    for iteration in range(2, 18, 2):
        with calls_of(method, "student") as calls:
            result = method.single_train_step(batch_of(1), iteration)
        result.loss_map["total_loss"].backward()
        modules = method.bundle["student"].modules
        reached = {k for k, m in modules.items() if any(p.grad is not None for p in m.parameters())}
        take_gradient(method)
        learned = {t for _, t, learns in calls if learns and t}
        assert reached == {"transformer" if min(learned) > 875 else "transformer_2"}
        if "transformer_2" in reached:
            assert learned == {400.0}
            assert {1000.0, 950.0} <= {t for _, t, learns in calls if not learns}
        turns |= reached
    assert turns == {"transformer", "transformer_2"}


@pytest.mark.parametrize("kind", ["self_forcing", "causvid", "per_chunk", "clean"])
def test_micro_batches_are_one_large_batch(build, kind):
    """4 == 2 + 2 == 1 + 1 + 1 + 1, with one step, so that no exit step is drawn."""
    one = SamplerSpec(steps=1, stochastic=True, context_noise=100.0)
    config = {
        "self_forcing": SelfForcingConfig(**MATCHING, student_sampler=one),
        "causvid": CausVidConfig(**MATCHING),
        "per_chunk": FinetuneConfig(times="per_chunk", weighting="bsmntw"),
        "clean": FinetuneConfig(times="per_chunk", past="clean", student_sampler=one),
    }[kind]
    roles = ("student",) if kind in ("per_chunk", "clean") else ("student", "critic")
    for iteration, role in zip((STUDENTS_TURN, CRITICS_TURN), roles, strict=False):
        outcomes = []
        for size in (4, 2, 1):
            method, batch = build(config, causal={"chunk_frames": 2}), batch_of(4)
            for start in range(0, 4, size):
                result = method.single_train_step(part(batch, start, start + size), iteration)
                (result.loss_map["total_loss"] * size / 4).backward()
            outcomes.append(take_gradient(method, role))
        for other in outcomes[1:]:
            assert_close(other, outcomes[0])


# -- CausVid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False])
def test_causvid_noises_each_chunk_by_itself(build, clean):
    """Levels of the sampler (and 0); a clean chunk is the data; one block-causal call."""
    config = CausVidConfig(**MATCHING, student_sampler=SPEC, clean_chunks=clean)
    method, batch = build(config, causal={"chunk_frames": 2}), batch_of(2)
    data, levels, different = method.adapter.normalize_latents(batch.latents), set(), 0
    for i in range(6):
        times = []
        transformer = method.bundle["student"].modules["transformer"]
        hook = transformer.register_forward_pre_hook(
            lambda m, args, kwargs, times=times: times.append(
                kwargs["timestep"].unflatten(1, (5, 6))
            ),
            with_kwargs=True,
        )
        result = method.single_train_step(batch, STUDENTS_TURN)
        hook.remove()
        [t] = times  # [B, T, tokens of a frame]
        assert torch.equal(t, t[..., :1].expand_as(t))
        t = t[..., 0]
        assert torch.equal(t[:, [0, 2]], t[:, [1, 3]])
        levels |= set(t.flatten().tolist())
        different += len(set(t[0].tolist())) > 1
        x0 = result.outputs["student_x0"]
        for row, frame in torch.nonzero(t == 0).tolist():
            assert torch.equal(x0[row, :, frame], data[row, :, frame])
        # By hand: noise and one call.
        streams = RandomStreams(0)
        for _ in range(i + 1):
            noise = streams.rows("causvid.student.data_noise", 2).normal(SHAPE)
        s = (t / 1000)[:, None, :, None, None]
        x_t = (1 - s) * data + s * noise
        with torch.no_grad():
            expected = x_t - s * method.adapter.forward("student", x_t, t, batch.cond)
        torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)
        result.loss_map["total_loss"].backward()
        assert take_gradient(method, "critic") is None
        if bool((t > 0).any()):
            assert take_gradient(method).norm() > 0
    assert levels == {1000.0, 800.0, 400.0} | ({0.0} if clean else set())
    assert different > 1


def test_causvid_trains_one_of_two_experts_an_iteration(build):
    spec = SamplerSpec(steps=3, timesteps=(1000, 950, 400), stochastic=True)
    method = build(
        CausVidConfig(**MATCHING, student_sampler=spec),
        variant="t2v-experts",
        causal={"chunk_frames": 1},
    )
    seen = set()
    for iteration in range(2, 18, 2):
        with calls_of(method, "student") as calls:
            method.single_train_step(batch_of(2), iteration)
        assert len(calls) == 1
        seen.add(calls[0][1])
    assert seen <= {1000.0, 950.0, 400.0, 0.0}
    assert seen & {1000.0, 950.0}
    assert seen & {400.0, 0.0}


# -- finetune -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("past", "context", "most"), [
    ("noisy", 0.0, None), ("clean", 0.0, None), ("clean", 100.0, None), ("clean", 100.0, 600.0),
])  # fmt: skip
@pytest.mark.parametrize("times", ["per_clip", "per_chunk"])
def test_a_causal_finetune_by_hand(build, times, past, context, most):
    """mean over samples, frames ... of w(t of the frame) |v - (eps - x0)|^2."""
    config = FinetuneConfig(
        time=TimeSampling(shift=3.0), weighting="bsmntw", times=times, past=past,
        student_sampler=SamplerSpec(steps=2, context_noise=context), past_t_max=most,
    )  # fmt: skip
    method, batch = build(config, causal={"chunk_frames": 2}), batch_of(2)
    with calls_of(method, "student") as calls:
        loss = method.single_train_step(batch, 1).loss_map["total_loss"]
    assert [n for n, _, _ in calls] == [5 if past == "noisy" else 10]
    streams, x0 = RandomStreams(0), method.adapter.normalize_latents(batch.latents)
    if times == "per_clip":
        u = streams.rows("finetune.t", 2).uniform()[:, None].expand(2, 5)
    else:
        u = streams.rows("finetune.t", 2).uniform((3,))[:, [0, 0, 1, 1, 2]]
    t = 1000 * 3 * u / (1 + 2 * u)
    s = (t / 1000)[:, None, :, None, None]
    noise = streams.rows("finetune.noise", 2).normal(SHAPE)
    beside = None
    if past == "clean":
        past_t = torch.full((2,), context)
        if most is not None:
            past_t += (most - context) * streams.rows("finetune.past.t", 2).uniform()
        c = (past_t / 1000)[:, None, None, None, None]
        eps = streams.rows("finetune.past", 2).normal(SHAPE) if context else 0
        beside = CleanPast(latents=(1 - c) * x0 + c * eps, t=past_t)
    v = method.adapter.forward("student", (1 - s) * x0 + s * noise, t, batch.cond, caches=beside)
    bell = torch.exp(-2 * ((t.double() - 500) / 1000) ** 2)
    grid = torch.exp(-2 * (torch.linspace(-0.5, 0.5, 100001, dtype=torch.float64)) ** 2)
    weight = (bell - grid.min()) / (grid - grid.min()).mean()
    error = (v - (noise - x0)).double().square().mean(dim=(1, 3, 4))
    assert loss.item() == pytest.approx((weight * error).mean().item(), rel=1e-4)


def test_per_chunk_times_of_two_experts_lie_on_one_side(build):
    config = FinetuneConfig(time=TimeSampling(shift=8.0), times="per_chunk", past="clean")
    method = build(config, variant="t2v-experts", causal={"chunk_frames": 1})
    sides = []
    for iteration in range(1, 11):
        method.single_train_step(batch_of(2), iteration).loss_map["total_loss"].backward()
        modules = method.bundle["student"].modules
        [reached] = [
            k for k, m in modules.items() if any(p.grad is not None for p in m.parameters())
        ]
        sides.append(reached)
        take_gradient(method)
    assert len(set(sides)) == 2


# -- what they need -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SelfForcingConfig(**MATCHING),
        CausVidConfig(**MATCHING),
        FinetuneConfig(times="per_chunk"),
        FinetuneConfig(past="clean"),
    ],
    ids=["self_forcing", "causvid", "per_chunk", "clean"],
)
def test_a_student_that_is_not_causal_is_refused(build, config):
    with pytest.raises(CapabilityError, match="causal:student"):
        build(config)
