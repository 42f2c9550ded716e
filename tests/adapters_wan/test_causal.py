"""Causal roles: block-causal attention, caches, gradients. Tolerances are absolute, outputs ~ 1."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading

import attrs
import pytest
import torch
from causal_reference import ReferenceProcessor, chunk_lists, seen_beside_clean, seen_in_clip
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_checkpoint.state_dicts import pack, unpack
from distill_diffusers.calls import flow
from distill_diffusers.roles import attention
from distill_protocols import (
    CapabilityError,
    ChunkCall,
    CleanPast,
    Condition,
    ContractError,
    LoraSpec,
    RoleError,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    WeightsError,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GRID = (2, 3)  # tokens of a frame
SAME = 1e-5
"""fp32, sums in another order."""

property_based = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(batch, frames, seed=0):
    return normal(batch, 4, frames, 4, 6, seed=seed)


def text(batch, seed=1):
    return Condition({"text": normal(batch, 6, 16, seed=seed)})


def times(batch, frames, seed=2):
    return 1000 * torch.rand(batch, frames, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def causal(pipeline_template):
    """(adapter, bundle) by the causal section's numbers; trained and a stock role of one path.

    Weights and biases are made larger than diffusers draws them, so that attention and its
    positions matter to the output.
    """

    @functools.lru_cache(maxsize=64)
    def make(roles=("student",), others=("teacher",), precision="fp32", lora=None, **numbers):
        config = WanPipelineConfig(
            num_frames=25, height=32, width=48, max_sequence_length=6,
            causal=CausalConfig(roles=roles, **numbers),
        )  # fmt: skip
        source = str(pipeline_template)
        specs = [
            RoleSpec(name=n, path=source, trainable=n != "teacher", precision=precision,
                     lora=lora if n in roles else None)
            for n in (*roles, *others)
        ]  # fmt: skip
        bundle = PLUGIN.load(specs, config, device=torch.device("cpu"))
        for role in bundle.roles.values():
            enlarge(role.modules["transformer"])
        return PLUGIN.adapter(bundle, config, source=source), bundle

    return make


@torch.no_grad()
def enlarge(transformer):
    for name, parameter in sorted(transformer.named_parameters()):
        if "lora_" in name:
            continue
        seed = sum(map(ord, name))
        if any(part in name for part in (".attn1.to_", "proj_out.weight", ".ffn.")):
            noise = normal(*parameter.shape, seed=seed)
            parameter.copy_(parameter + 0.3 * noise.to(parameter))


def reference(bundle, seen):
    """Put the causal role's weights into a stock module, with attention by ``causal_reference``."""
    ours = bundle["student"].modules["transformer"]
    stock = copy.deepcopy(bundle["teacher"].modules["transformer"])
    stock.load_state_dict(ours.state_dict())
    for block in stock.blocks:
        block.attn1.set_processor(ReferenceProcessor(seen, GRID))

    @torch.no_grad()
    def velocity(x, frame_t, cond):
        return stock(
            hidden_states=x,
            timestep=frame_t.repeat_interleave(GRID[0] * GRID[1], dim=1),
            encoder_hidden_states=cond.tensors["text"],
            return_dict=False,
        )[0]

    return velocity


def rollout(adapter, x, t, cond, *, role="student", clean=None, stream="rollout", **guidance):
    """Chunk by chunk. Each call stores, or a second one on ``clean`` at t = 0 does."""
    adapter.clear_caches(role, stream=stream)
    out = []
    for chunk in adapter.chunks(role, x.shape[2]):

        def call(latents, t, store, at=chunk):
            where = ChunkCall(first_frame=at.first, store=store, stream=stream)
            return adapter.forward(role, latents[:, :, at.span], t[:, at.span], cond,
                                   caches=where, **guidance)  # fmt: skip

        out.append(call(x, t, clean is None))
        if clean is not None:
            with torch.no_grad():
                call(clean, torch.zeros_like(t), True)
    return torch.cat(out, dim=2)


@st.composite
def draw_sections(draw, most=9):
    """Draw numbers of the causal section and of a clip."""
    size, alone = draw(st.integers(1, 3)), draw(st.booleans())
    frames = draw(st.integers(1, most))
    if draw(st.booleans()):
        return {"chunk_frames": size, "first_frame_alone": alone}, frames
    sinks = [0, 1, 1 + size] if alone else [0, size, 2 * size]
    sink = draw(st.sampled_from(sinks))
    window = sink + size * draw(st.integers(1, 3))
    positions = draw(st.sampled_from(["moving", "kept"])) if sink else "moving"
    return {
        "chunk_frames": size, "first_frame_alone": alone,
        "window_frames": window, "sink_frames": sink, "sink_positions": positions,
    }, frames  # fmt: skip


def as_reference(numbers):
    keys = {"chunk_frames": "size", "first_frame_alone": "alone", "window_frames": "window",
            "sink_frames": "sink", "sink_positions": "positions"}  # fmt: skip
    return {keys[name]: value for name, value in numbers.items()}


# -- what is attended to --------------------------------------------------------------------------


@property_based
@given(draw_sections(), st.integers(1, 3))
def test_a_full_clip_equals_an_independent_attention(causal, drawn, batch):
    numbers, frames = drawn
    adapter, bundle = causal(**numbers)
    x, t, cond = clip(batch, frames), times(batch, frames), text(batch)
    expected = reference(bundle, seen_in_clip(frames, **as_reference(numbers)))(x, t, cond)
    with torch.no_grad():
        ours = adapter.forward("student", x, t, cond)
    assert torch.allclose(ours, expected, atol=SAME)


@property_based
@given(draw_sections(), st.integers(1, 2))
def test_cached_chunks_equal_the_whole_clip(causal, drawn, batch):
    numbers, frames = drawn
    adapter, _ = causal(**numbers)
    x, t, cond = clip(batch, frames), times(batch, frames), text(batch)
    with torch.no_grad():
        full = adapter.forward("student", x, t, cond)
        assert torch.allclose(rollout(adapter, x, t, cond), full, atol=SAME)


@property_based
@given(draw_sections(most=8))  # twice as many must fit the 16 positions of the stock model
def test_teacher_forcing_equals_a_rollout_on_clean_pasts_and_the_reference(causal, drawn):
    numbers, frames = drawn
    adapter, bundle = causal(**numbers)
    x, clean, t, cond = clip(2, frames), clip(2, frames, seed=5), times(2, frames), text(2)
    forced = adapter.forward("student", x, t, cond, caches=CleanPast(latents=clean))
    with torch.no_grad():
        assert torch.allclose(rollout(adapter, x, t, cond, clean=clean), forced, atol=SAME)
    seen = seen_beside_clean(frames, **as_reference(numbers))
    both, both_t = torch.cat([clean, x], 2), torch.cat([torch.zeros_like(t), t], 1)
    expected = reference(bundle, seen)(both, both_t, cond)[:, :, frames:]
    assert torch.allclose(forced, expected, atol=SAME)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_guidance_keeps_two_pasts(causal, window):
    adapter, _ = causal(chunk_frames=2, window_frames=window)
    x, t, clean = clip(2, 7), times(2, 7), clip(2, 7, seed=5)
    guided = {"neg_cond": text(1, seed=9), "cfg": 3.0}
    full = adapter.forward("student", x, t, text(2), **guided)
    assert torch.allclose(rollout(adapter, x, t, text(2), **guided), full, atol=SAME)
    forced = adapter.forward("student", x, t, text(2), caches=CleanPast(latents=clean), **guided)
    rolled = rollout(adapter, x, t, text(2), clean=clean, **guided)
    assert torch.allclose(rolled, forced, atol=SAME)
    alone = rollout(adapter, x, t, text(2), clean=clean)
    assert not torch.allclose(rolled, alone, atol=1e-2)


@property_based
@given(draw_sections(), st.data())
def test_later_chunks_change_nothing_before_them(causal, drawn, data):
    """Exactly. And within a chunk the last frame does change the first."""
    numbers, frames = drawn
    adapter, _ = causal(**numbers)
    chunk = data.draw(st.sampled_from(adapter.chunks("student", frames)))
    x, t, cond = clip(1, frames), times(1, frames), text(1)
    other = x.clone()
    other[:, :, chunk.stop - 1 :] += 1
    before = slice(0, chunk.first)
    with torch.no_grad():
        one, two = (adapter.forward("student", y, t, cond) for y in (x, other))
    assert torch.equal(one[:, :, before], two[:, :, before])
    assert not torch.allclose(one[:, :, chunk.first], two[:, :, chunk.first], atol=1e-3)
    one, two = (
        adapter.forward("student", x, t, cond, caches=CleanPast(latents=y)) for y in (x, other)
    )
    assert torch.equal(one[:, :, : chunk.stop], two[:, :, : chunk.stop])


@torch.no_grad()
def test_a_window_as_long_as_the_video_is_no_window(causal):
    x, t, cond = clip(2, 7), times(2, 7), text(2)
    adapters = [causal(chunk_frames=3, window_frames=w)[0] for w in (None, 9, 6)]
    full, long, short = (rollout(adapter, x, t, cond) for adapter in adapters)
    assert torch.equal(full, long)
    assert torch.equal(full[:, :, :6], short[:, :, :6])
    assert not torch.allclose(full[:, :, 6:], short[:, :, 6:], atol=1e-3)


@torch.no_grad()
def test_one_chunk_is_the_stock_model_bit_for_bit(causal):
    adapter, bundle = causal(chunk_frames=7)
    teacher = bundle["teacher"].modules["transformer"]
    teacher.load_state_dict(bundle["student"].modules["transformer"].state_dict())
    x, t, cond = clip(2, 7), torch.tensor([900.0, 333.3]), text(2)
    stock = adapter.forward("teacher", x, t, cond)
    assert torch.equal(adapter.forward("student", x, t, cond), stock)
    call = ChunkCall(first_frame=0)
    assert torch.equal(adapter.forward("student", x, t, cond, caches=call), stock)


@torch.no_grad()
def test_other_roles_stay_as_diffusers_made_them(causal):
    adapter, bundle = causal(chunk_frames=2)
    teacher = bundle["teacher"].modules["transformer"]
    assert {type(p) for p in teacher.attn_processors.values()} == {WanAttnProcessor}
    assert not teacher._forward_pre_hooks
    assert not teacher.rope._forward_hooks
    x, t, cond = clip(1, 7), torch.tensor([500.0]), text(1)
    other = x.clone()
    other[:, :, -1] += 1
    one, two = (adapter.forward("teacher", y, t, cond) for y in (x, other))
    assert not torch.allclose(one[:, :, 0], two[:, :, 0], atol=1e-3)
    assert adapter.chunks("teacher")[0].frames == 7
    for caches in (ChunkCall(first_frame=0), CleanPast(latents=x)):
        with pytest.raises(CapabilityError, match=r"teacher.*CausalConfig\.roles"):
            adapter.forward("teacher", x, t, cond, caches=caches)


@torch.no_grad()
def test_a_transformer_that_is_called_by_itself_is_block_causal(causal):
    adapter, bundle = causal(chunk_frames=3)
    x, cond = clip(1, 7), text(1)
    (alone,) = bundle["student"].modules["transformer"](
        hidden_states=x, timestep=torch.tensor([500.0]),
        encoder_hidden_states=cond.tensors["text"], return_dict=False,
    )  # fmt: skip
    assert torch.equal(alone, adapter.forward("student", x, torch.tensor([500.0]), cond))


@torch.no_grad()
def test_a_time_a_frame(causal):
    """Equal times are one time, within 4e-6 of outputs of 1; others are not."""
    adapter, _ = causal(chunk_frames=2)
    x, cond, t = clip(2, 6), text(2), torch.tensor([900.0, 333.3])
    for role in ("student", "teacher"):
        one = adapter.forward(role, x, t, cond)
        frames = t[:, None].expand(2, 6)
        assert torch.allclose(adapter.forward(role, x, frames, cond), one, atol=SAME)
        assert not torch.allclose(adapter.forward(role, x, times(2, 6), cond), one, atol=1e-3)
    assert torch.equal(flow.add_noise(x, clip(2, 6, seed=3), frames),
                       flow.add_noise(x, clip(2, 6, seed=3), t))  # fmt: skip
    mixed = flow.add_noise(x, clip(2, 6, seed=3), torch.tensor([[0.0, 1000.0] * 3] * 2))
    assert torch.equal(mixed[:, :, 0::2], x[:, :, 0::2])
    assert torch.equal(mixed[:, :, 1::2], clip(2, 6, seed=3)[:, :, 1::2])
    with pytest.raises(ContractError, match=r"\[B, T\]"):
        adapter.forward("student", x, times(2, 5), cond)


# -- long videos ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lead", [2, 14])
def test_a_long_rollout_does_not_depend_on_where_it_stands(causal, lead):
    """Bit for bit, once all that came before has left the window (two layers deep).

    Frames 0..39 are far beyond the model's 16 positions.
    """
    adapter, _ = causal(chunk_frames=2, window_frames=6)
    x, t, cond = clip(1, 26), times(1, 26), text(1)
    later_x = torch.cat([clip(1, lead, seed=8), x], dim=2)
    later_t = torch.cat([times(1, lead, seed=8), t], dim=1)
    here, there = rollout(adapter, x, t, cond), rollout(adapter, later_x, later_t, cond)
    there = there[:, :, lead:]
    assert torch.equal(here[:, :, 8:], there[:, :, 8:])
    assert not torch.allclose(here[:, :, :2], there[:, :, :2], atol=1e-3)


@torch.no_grad()
def test_a_still_video_with_a_sink_becomes_stationary(causal):
    """The sink stays right before the window, so nothing changes any more; exactly."""
    adapter, _ = causal(chunk_frames=2, first_frame_alone=True, window_frames=5, sink_frames=1)
    x = clip(1, 1).expand(-1, -1, 41, -1, -1)
    out = rollout(adapter, x, torch.full((1, 41), 400.0), text(1))
    chunks = out[:, :, 1:].unflatten(2, (-1, 2))
    assert torch.equal(chunks[:, :, 6:-1], chunks[:, :, 7:])
    assert not torch.allclose(chunks[:, :, 0], chunks[:, :, -1], atol=1e-3)


@torch.no_grad()
def test_a_sink_that_keeps_its_rotation_falls_behind(causal):
    """Equal until a frame has left the window, other numbers after it; and the positions end."""
    config = {"chunk_frames": 2, "window_frames": 6, "sink_frames": 2}
    x, t, cond = clip(1, 14), times(1, 14), text(1)
    moving, kept = (
        rollout(causal(**config, sink_positions=positions)[0], x, t, cond)
        for positions in ("moving", "kept")
    )
    assert torch.allclose(moving[:, :, :6], kept[:, :, :6], atol=SAME)
    assert not torch.allclose(moving[:, :, 6:], kept[:, :, 6:], atol=1e-3)
    adapter, _ = causal(**config, sink_positions="kept")
    with pytest.raises(ContractError, match=r"16 \(rope_max_seq_len\).*sink_positions moving"):
        rollout(adapter, clip(1, 20), times(1, 20), cond)


@torch.no_grad()
def test_the_cache_is_bounded_by_the_window(causal):
    adapter, _ = causal(chunk_frames=2, window_frames=8, sink_frames=2)
    adapter.clear_caches("student")
    sizes = []
    for chunk in adapter.chunks("student", 30):
        call = ChunkCall(first_frame=chunk.first, store=True)
        adapter.forward("student", clip(3, 2), times(3, 2), text(3), caches=call)
        sizes.append(adapter.cached_bytes("student"))
    layers, width, frame = 2, 24, GRID[0] * GRID[1]
    chunk_bytes = layers * 2 * 3 * (2 * frame) * width * 4
    assert sizes == [chunk_bytes * min(i + 1, 3) for i in range(15)]
    adapter.clear_caches("student")
    assert adapter.cached_bytes("student") == 0


@torch.no_grad()
def test_without_a_window_the_positions_end(causal):
    adapter, _ = causal(chunk_frames=4)
    with pytest.raises(ContractError, match=r"16 \(rope_max_seq_len\).*window_frames"):
        rollout(adapter, clip(1, 20), times(1, 20), text(1))
    with pytest.raises(ContractError, match=r"window_frames"):
        adapter.forward("student", clip(1, 17), times(1, 17), text(1))


# -- videos that go on ----------------------------------------------------------------------------

SPEC = SamplerSpec(steps=2, timesteps=(1000, 600), stochastic=True)
SECTIONS = (
    {"chunk_frames": 2},
    {"chunk_frames": 2, "window_frames": 6, "sink_frames": 2},
    {"chunk_frames": 2, "window_frames": 6, "sink_frames": 2, "sink_positions": "kept"},
)


def extend(adapter, noise, cond, spans, *, stream="video", generators=None, **options):
    """Extend a video by each of ``spans`` of frames."""
    generators = generators or RowGenerators.seeded(0, "fresh", range(len(noise)))
    return torch.cat(
        [
            adapter.extend(
                "student", SPEC, noise[:, :, a:b], cond, first_frame=a, stream=stream,
                exit_steps=[1] * ((b - a) // 2), generators=generators, **options,
            )
            for a, b in spans
        ],
        dim=2,
    )  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_a_video_in_parts_is_the_rollout_of_the_whole(causal, section):
    """Bit for bit, and so are the gradients of what was made with one."""
    adapter, bundle = causal(**section)
    transformer, cond, noise = bundle["student"].modules["transformer"], text(2), clip(2, 12)
    generators = RowGenerators.seeded(0, "fresh", range(2))
    whole = adapter.rollout(
        "student", SPEC, noise, cond, exit_steps=[1] * 6, generators=generators,
        requires_grad=[False] * 3 + [True] * 3,
    )  # fmt: skip

    def gradient(x):
        transformer.zero_grad(set_to_none=True)
        x[:, :, 6:].square().mean().backward()
        return [p.grad.clone() for p in transformer.parameters() if p.grad is not None]

    expected = gradient(whole)
    adapter.clear_caches("student")
    parts = extend(adapter, noise, cond, [(0, 2), (2, 6), (6, 12)])
    assert torch.equal(parts, whole)
    ours = gradient(parts)
    assert len(ours) > 20
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(ContractError, match="no chunk of role 'student' begins at frame 13"):
        adapter.extend("student", SPEC, noise, cond, first_frame=13, stream="video",
                       exit_steps=[1] * 6)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("section", SECTIONS)
def test_a_video_goes_on_from_its_stored_past(causal, section):
    """Through the files of a checkpoint, and under a condition that is equal but another object."""
    adapter, _ = causal(**section)
    cond, noise = text(2), clip(2, 12)
    adapter.clear_caches("student")
    extend(adapter, noise, cond, [(0, 8)])
    packed, tensors = pack(adapter.past_state("student", stream="video"), "past")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = extend(adapter, noise, cond, [(8, 12)])
    adapter.clear_caches("student")
    adapter.load_past("student", unpack(packed, copies), text(2), stream="video")
    assert torch.equal(extend(adapter, noise, text(2), [(8, 12)]), expected)
    adapter.clear_caches("student")
    assert adapter.past_state("student", stream="video") == {}


@torch.no_grad()
@pytest.mark.parametrize("section", SECTIONS)
def test_a_past_that_is_made_anew_knows_the_new_prompt_alone(causal, section):
    adapter, _ = causal(**section)
    noise, frames = clip(2, 12), 4
    adapter.clear_caches("student")
    extend(adapter, noise, text(2), [(0, frames)])
    before = adapter.past_state("student", stream="video")["transformer"]
    adapter.rebuild_past("student", text(2, seed=9), stream="video")
    after = adapter.past_state("student", stream="video")["transformer"]
    for one, two in zip(before["chunks"], after["chunks"], strict=True):
        assert torch.equal(one["x_t"], two["x_t"])
        # Keys of the first layer are of frames alone; those above have read the prompt.
        assert torch.equal(one["layers"][0][0], two["layers"][0][0])
        assert not torch.allclose(one["layers"][1][0], two["layers"][1][0], atol=1e-3)
    # Until a frame has left the window it is the past of a video that had this prompt all along.
    adapter.rebuild_past("student", text(2), stream="video")
    again = adapter.past_state("student", stream="video")["transformer"]
    for one, two in zip(before["chunks"], again["chunks"], strict=True):
        for first, second in zip(one["layers"], two["layers"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # And it goes on after a gap too.
    extend(adapter, noise, text(2), [(frames, 10)])
    adapter.rebuild_past("student", text(2, seed=9), stream="video")
    extend(adapter, noise, text(2, seed=9), [(10, 12)])
    kept = [
        one["first"]
        for one in adapter.past_state("student", stream="video")["transformer"]["chunks"]
    ]
    assert kept == ([0, 2, 4, 6, 8, 10] if "window_frames" not in section else [0, 10])


# -- gradients ------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpointing(transformer, enabled):
    if enabled:
        transformer.enable_gradient_checkpointing()
    yield
    transformer.disable_gradient_checkpointing()


def rollout_gradients(adapter, bundle, chunks, weights, *, checkpointed):
    """Return gradients of parameters and of each chunk's input."""
    transformer = bundle["student"].modules["transformer"]
    transformer.zero_grad(set_to_none=True)
    inputs = [c.clone().requires_grad_() for c in chunks]
    adapter.clear_caches("student")
    with checkpointing(transformer, checkpointed):
        loss, first = 0.0, 0
        for x, w in zip(inputs, weights, strict=True):
            t = torch.full((2,), 700.0)
            x0 = flow.pred_to_x0(
                adapter.forward("student", x, t, text(2), caches=ChunkCall(first_frame=first)), x, t
            )
            loss = loss + w * x0.square().sum()
            call = ChunkCall(first_frame=first, store=True)
            # With gradient on purpose: what is stored must be detached by itself.
            adapter.forward("student", x0, torch.zeros(2), text(2), caches=call)
            first += x.shape[2]
        adapter.clear_caches("student")
        loss.backward()
    return [p.grad for p in transformer.parameters() if p.grad is not None], inputs


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_chunks_gradient_reaches_no_chunk_before_it(causal, window, checkpointed):
    adapter, bundle = causal(chunk_frames=2, window_frames=window)
    chunks = [clip(2, 2, seed=i) for i in range(3)]
    for last in range(3):
        weights = [float(i == last) for i in range(3)]
        _, inputs = rollout_gradients(adapter, bundle, chunks, weights, checkpointed=checkpointed)
        reached = [bool(x.grad.abs().max() > 0) for x in inputs]
        assert reached == [i == last for i in range(3)]


@pytest.mark.parametrize("window", [None, 4])
def test_checkpointing_changes_no_gradient(causal, window):
    """The caches went on, and were cleared, between forward and recomputation. Bit for bit."""
    adapter, bundle = causal(chunk_frames=2, window_frames=window)
    chunks, weights = [clip(2, 2, seed=i) for i in range(4)], [1.0, 0.5, 2.0, 1.0]
    plain, inputs = rollout_gradients(adapter, bundle, chunks, weights, checkpointed=False)
    again, inputs_again = rollout_gradients(adapter, bundle, chunks, weights, checkpointed=True)
    assert len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for a, b in zip(inputs, inputs_again, strict=True):
        assert torch.equal(a.grad, b.grad)
    assert adapter.cached_bytes("student") == 0  # recomputation stored nothing


def test_recomputation_keeps_nothing(causal):
    """What a stored call holds for its backward pass is the past that it saw, no second copy."""
    adapter, bundle = causal(chunk_frames=2)
    transformer, seen = bundle["student"].modules["transformer"], []
    hook = transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["causal"]), with_kwargs=True, prepend=True
    )
    chunks = [clip(2, 2, seed=i) for i in range(2)]
    rollout_gradients(adapter, bundle, chunks, [1.0, 1.0], checkpointed=True)
    hook.remove()
    assert [call.past.frames for call in seen] == [0, 0, 2, 2]
    assert [call.kept for call in seen] == [None] * 4


def test_a_checkpoint_around_the_whole_transformer_recomputes_the_same(causal):
    """The call is an argument, so it goes wherever the arguments go."""
    from torch.utils.checkpoint import checkpoint

    adapter, bundle = causal(chunk_frames=2)
    transformer, forward = bundle["student"].modules["transformer"], None
    chunks, weights = [clip(2, 2, seed=i) for i in range(3)], [1.0, 1.0, 1.0]
    plain, _ = rollout_gradients(adapter, bundle, chunks, weights, checkpointed=False)
    forward = type(transformer).__call__

    class Wrapped(type(transformer)):
        def __call__(self, **kwargs):
            return checkpoint(functools.partial(forward, self), use_reentrant=False, **kwargs)

    own, transformer.__class__ = type(transformer), Wrapped
    try:
        again, _ = rollout_gradients(adapter, bundle, chunks, weights, checkpointed=False)
    finally:
        transformer.__class__ = own
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_of_whole_clips_are_causal_and_a_clean_past_takes_none(causal):
    adapter, bundle = causal(chunk_frames=2)
    x, clean = clip(1, 6).requires_grad_(), clip(1, 6, seed=3).requires_grad_()
    v = adapter.forward("student", x, times(1, 6), text(1))
    (grad,) = torch.autograd.grad(v[:, :, 2:4].square().sum(), x)
    assert grad[:, :, 4:].abs().max() == 0
    assert grad[:, :, :2].abs().max() > 0
    v = adapter.forward("student", x, times(1, 6), text(1), caches=CleanPast(latents=clean))
    v[:, :, 2:4].square().sum().backward()
    assert clean.grad is None
    reached = x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [False, False, True, True, False, False]
    bundle["student"].modules["transformer"].zero_grad()


# -- whose past it is -----------------------------------------------------------------------------


@torch.no_grad()
def test_roles_conditions_and_streams_do_not_mix(causal):
    adapter, _ = causal(roles=("student", "other"), chunk_frames=2, window_frames=4)
    jobs = [
        {"role": role, "cond": text(2, seed=seed), "x": clip(2, 6, seed=seed), "stream": stream}
        for role, seed, stream in [("student", 1, "a"), ("student", 2, "b"), ("other", 3, "a")]
    ]
    guided = {"neg_cond": text(1, seed=9), "cfg": 2.0}
    t = times(2, 6)
    alone = [
        rollout(adapter, j["x"], t, j["cond"], role=j["role"], stream=j["stream"], **guided)
        for j in jobs
    ]
    for role in ("student", "other"):
        adapter.clear_caches(role)
    mixed = [[] for _ in jobs]
    for chunk in adapter.chunks("student", 6):
        for job, out in zip(jobs, mixed, strict=True):
            call = ChunkCall(first_frame=chunk.first, store=True, stream=job["stream"])
            out.append(
                adapter.forward(
                    job["role"], job["x"][:, :, chunk.span], t[:, chunk.span], job["cond"],
                    caches=call, **guided,
                )
            )  # fmt: skip
    for a, b in zip(alone, mixed, strict=True):
        assert torch.equal(a, torch.cat(b, dim=2))
    adapter.clear_caches("student", stream="a")
    assert adapter.cached_bytes("student") == adapter.cached_bytes("other") > 0
    adapter.clear_caches("student")
    assert adapter.cached_bytes("student") == 0 < adapter.cached_bytes("other")


def test_rollouts_in_several_threads_are_independent(causal):
    """Two threads on one role's one module, each with its own stream."""
    adapter, _ = causal(chunk_frames=2, window_frames=4)
    t, inputs = times(1, 12), [clip(1, 12, seed=i) for i in range(2)]

    @torch.no_grad()
    def roll(i, stream):
        return rollout(adapter, inputs[i], t, text(1, seed=i), stream=stream)

    expected = [roll(i, "alone") for i in range(2)]
    actual = [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(4):
            actual[i].append(roll(i, f"thread {i}"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(actual[i]) == 4
        assert all(torch.equal(out, expected[i]) for out in actual[i])


@torch.no_grad()
def test_a_past_that_does_not_fit_is_refused(causal):
    adapter, _ = causal(chunk_frames=2)
    adapter.clear_caches("student")
    cond = text(2)

    def call(first, *, frames=2, batch=2, cond=cond, store=False, x=None, **more):
        x = clip(batch, frames) if x is None else x
        where = ChunkCall(first_frame=first, store=store)
        return adapter.forward("student", x, times(*x.shape[0:3:2]), cond, caches=where, **more)

    with pytest.raises(
        ContractError, match=r"begins at frame 2.*ends before frame 0.*clear_caches"
    ):
        call(2)
    call(0, store=True)
    call(2)
    with pytest.raises(ContractError, match=r"begins at frame 0.*ends before frame 2"):
        call(0, store=True)
    for odd in ({"first": 3}, {"first": 2, "frames": 3}):
        with pytest.raises(ContractError, match="no chunk"):
            call(**odd)
    with pytest.raises(ContractError, match=r"another video.*batch.*\(2, 4, 6\).*\(3, 4, 6\)"):
        call(2, batch=3, cond=text(3))
    with pytest.raises(ContractError, match=r"\(2, 4, 6\) and is \(2, 6, 6\)"):
        call(2, x=normal(2, 4, 2, 6, 6))
    with pytest.raises(ContractError, match="condition is another"):
        call(2, cond=text(2, seed=7))
    call(2, cond=Condition({"text": cond.tensors["text"].clone()}))  # equal, though a copy
    with pytest.raises(ContractError, match=r"negative condition.*ends before frame 0"):
        call(2, neg_cond=text(1), cfg=2.0)  # the negative one was not called for the first chunk
    call(2, frames=1, store=True)  # a shorter chunk is a video's last
    with pytest.raises(ContractError, match="no chunk"):
        call(3)
    adapter.clear_caches("student")
    call(0, batch=3, cond=text(3), store=True)
    with pytest.raises(RoleError):
        adapter.clear_caches("nobody")
    with pytest.raises(ContractError, match="same clips"):
        adapter.forward(
            "student", clip(2, 4), times(2, 4), cond, caches=CleanPast(latents=clip(2, 6))
        )


@torch.no_grad()
def test_a_condition_that_was_written_to_is_another(causal):
    adapter, _ = causal(chunk_frames=2)
    adapter.clear_caches("student")
    cond = text(1)
    x, t = clip(1, 2), times(1, 2)
    adapter.forward("student", x, t, cond, caches=ChunkCall(first_frame=0, store=True))
    cond.tensors["text"].add_(1.0)
    with pytest.raises(ContractError, match="condition was written to"):
        adapter.forward("student", x, t, cond, caches=ChunkCall(first_frame=2))


# -- precision, LoRA ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_sixteen_bits(causal, role):
    """Trained under autocast, or frozen with 16-bit weights: within bf16's own error of fp32."""
    roles, others = ("student", "teacher"), ()
    x, t, cond = clip(2, 7), times(2, 7), text(2)
    adapter, bundle = causal(
        roles=roles, others=others, precision="bf16", chunk_frames=3, window_frames=6
    )
    weight = bundle[role].modules["transformer"].blocks[0].attn1.to_q.weight
    assert weight.dtype == (torch.float32 if role == "student" else torch.bfloat16)
    rolled = rollout(adapter, x, t, cond, role=role)
    assert rolled.dtype == torch.float32
    full = adapter.forward(role, x, t, cond)
    wide, _ = causal(roles=roles, others=others, chunk_frames=3, window_frames=6)
    exact = wide.forward(role, x, t, cond)
    rounding = (full - exact).square().mean().sqrt()
    assert 0 < rounding < 0.05
    assert (rolled - full).square().mean().sqrt() <= rounding
    assert (rolled - exact).square().mean().sqrt() <= 1.5 * rounding


def test_a_lora_role(causal):
    lora = LoraSpec(rank=2)
    adapter, bundle = causal(chunk_frames=2, window_frames=4, lora=lora)
    transformer = bundle["student"].modules["transformer"]
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(normal(*parameter.shape, seed=len(name)))
    x, t, cond = clip(2, 7), times(2, 7), text(2)
    with torch.no_grad():
        full = adapter.forward("student", x, t, cond)
        assert torch.allclose(rollout(adapter, x, t, cond), full, atol=SAME)
        base, _ = causal(chunk_frames=2, window_frames=4)
        assert not torch.allclose(base.forward("student", x, t, cond), full, atol=1e-2)
    chunks = [clip(2, 2, seed=i) for i in range(3)]
    plain, _ = rollout_gradients(adapter, bundle, chunks, [1.0] * 3, checkpointed=False)
    again, _ = rollout_gradients(adapter, bundle, chunks, [1.0] * 3, checkpointed=True)
    assert len(plain) == len(bundle["student"].trained_parameters("transformer"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# -- configuration --------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_chunks_divide_the_video(frames, size, alone):
    config = CausalConfig(roles=("student",), chunk_frames=size, first_frame_alone=alone)
    chunks = config.chunks(frames)
    assert [list(range(c.first, c.stop)) for c in chunks] == chunk_lists(
        frames, size=size, alone=alone
    )
    for chunk in chunks:
        assert config.chunk_at(chunk.first).frames >= chunk.frames
    assert sum(config.chunk_at(f) is not None for f in range(frames)) == len(chunks)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"chunk_frames": 0}, "at least one latent frame"),
        ({"window_frames": 7}, r"0 \+ 3k, at least 3"),
        ({"window_frames": 2}, "at least 3"),
        ({"window_frames": 6, "sink_frames": 1}, r"1 \+ 3k, at least 4"),
        ({"window_frames": 7, "sink_frames": 1}, r"multiple of chunk_frames \(3\)"),
        ({"window_frames": 9, "sink_frames": 3, "first_frame_alone": True}, r"1 \+ a multiple"),
        ({"sink_frames": 3}, "no effect without window_frames"),
        ({"sink_positions": "kept"}, "no effect without sink_frames"),
        ({"roles": ()}, "at least one role"),
        ({"roles": ("a", "a")}, "each once"),
    ],
)
def test_wrong_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**{"roles": ("student",), **numbers})


@pytest.fixture
def with_roles(pipeline_template, config):
    """Build an adapter of a bundle with other causal roles."""

    def make(bundle, *roles, **numbers):
        section = CausalConfig(roles=roles, **numbers) if roles else None
        causal_config = attrs.evolve(config, causal=section)
        return PLUGIN.adapter(bundle, causal_config, source=str(pipeline_template))

    return make


def test_capabilities_state_which_roles_are_causal(causal, config, with_roles):
    adapter, bundle = causal(chunk_frames=2)
    needed = ("supports_kv_cache", "supports_teacher_forcing", "supports_frame_times",
              "causal:student")  # fmt: skip
    adapter.capabilities.require(needed, by="test")
    with pytest.raises(CapabilityError, match="causal:teacher"):
        adapter.capabilities.require(["causal:teacher"], by="test")
    assert PLUGIN.capabilities(config).missing(needed) == (needed[0], needed[1], needed[3])
    with pytest.raises(RoleError, match="nobody"):
        with_roles(bundle, "nobody")


def test_two_adapters_of_one_bundle(make_adapter, with_roles):
    _, bundle = make_adapter(student=(True, "fp32"), teacher=(False, "fp32"))
    first = with_roles(bundle, "student", chunk_frames=2)
    second = with_roles(bundle, "student", chunk_frames=1)
    transformer = bundle["student"].modules["transformer"]
    assert len(transformer._forward_pre_hooks) == len(transformer.rope._forward_hooks) == 1
    assert len(transformer.rope._forward_pre_hooks) == 1
    x, t, cond = clip(1, 2), torch.tensor([500.0]), text(1)
    with torch.no_grad():
        assert not torch.allclose(
            *(a.forward("student", x, t, cond)[:, :, 0] for a in (first, second)), atol=1e-4
        )
    with pytest.raises(ContractError, match=r"student\.transformer.*made it causal"):
        with_roles(bundle)


def test_a_model_that_cannot_be_causal(pipeline, config):
    section = CausalConfig(roles=("student",), window_frames=18)
    causal_config = attrs.evolve(config, causal=section)
    role = RoleSpec(name="student", path=str(pipeline), trainable=True)
    (problem,) = PLUGIN.role_problems(role, causal_config)
    assert "window_frames 18 is more than the 16 positions" in problem.message
    teacher = RoleSpec(name="teacher", path=str(pipeline), trainable=False)
    assert not list(PLUGIN.role_problems(teacher, causal_config))
    bundle = PLUGIN.load([role], causal_config, device=torch.device("cpu"))
    with pytest.raises(WeightsError, match="window_frames 18"):
        PLUGIN.adapter(bundle, causal_config, source=str(pipeline))
    file = pipeline / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": [2, 2, 2]}))
    section = CausalConfig(roles=("student",))
    assert any(
        "folds 2 latent frames" in problem.message
        for problem in PLUGIN.role_problems(role, attrs.evolve(config, causal=section))
    )


def test_a_causal_role_has_the_kernel_that_is_named(pipeline_template):
    def loaded(backend):
        config = WanPipelineConfig(
            num_frames=25, height=32, width=48, max_sequence_length=6,
            causal=CausalConfig(roles=("student",), chunk_frames=2),
        )  # fmt: skip
        source = str(pipeline_template)
        role = RoleSpec(name="student", path=source, trainable=True, attention_backend=backend)
        bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
        enlarge(bundle["student"].modules["transformer"])
        adapter = PLUGIN.adapter(bundle, config, source=source)
        predict = functools.partial(
            adapter.forward, "student", clip(1, 4), times(1, 4), text(1), caches=None
        )
        return bundle["student"].modules["transformer"], predict

    outputs = []
    for backend in (None, "native", "_native_math"):
        _, predict = loaded(backend)
        outputs.append(predict())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[2]).abs().max() < SAME
    transformer, predict = loaded("_native_math")
    # No CPU has this one: it is really called, though the role was made causal before.
    attention.set_backend(transformer, "_native_cudnn")
    with pytest.raises(RuntimeError, match="No viable backend"):
        predict()
