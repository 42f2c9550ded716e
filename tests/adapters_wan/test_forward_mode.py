"""The derivative of a model call along a direction, against finite differences.

The modules are in fp64. Inside, diffusers casts times and norms to fp32, and the adapter what comes
out: so a difference over 2 h carries an error of about 1e-7 / h, and is extrapolated (Richardson)
from a large h. Tolerance: 1e-3 of the largest entry; what was seen is below 2e-4.
"""

from __future__ import annotations

import pytest
import torch
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_diffusers.calls import forward_mode
from distill_methods.derivatives import finite_difference
from distill_protocols import Condition, LoraSpec, RoleSpec
from wan_variants import VARIANTS

H = 0.04


@pytest.fixture(scope="module")
def make(pipeline_template):
    def made(*, config=None, source=None, **options):
        config = config or WanPipelineConfig(
            num_frames=9, height=32, width=48, max_sequence_length=6
        )
        source = str(source or pipeline_template)
        role = RoleSpec(name="student", path=source, trainable=True, **options)
        bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
        if role.precision == "fp32":
            bundle["student"].modules["transformer"].double()
        return PLUGIN.adapter(bundle, config, source=source), bundle

    return made


def inputs(adapter, batch: int = 2):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, dx = draw(batch, *adapter.latent_shape), draw(batch, *adapter.latent_shape)
    t = torch.tensor([300.0, 905.0])[:batch].double()
    return x, t, Condition({"text": draw(batch, 6, 16).float()}), dx, draw(batch)


def difference(adapter, x, t, cond, dx, dt):
    """d/dh v(x + h dx, t + h dt) by two central differences."""

    def central(h: float) -> torch.Tensor:
        up, down = (
            adapter.forward("student", x + s * h * dx, t + s * h * dt, cond) for s in (1, -1)
        )
        return (up.double() - down.double()) / (2 * h)

    with torch.no_grad():
        return (4 * central(H / 2) - central(H)) / 3


def close(actual, expected):
    assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("direction", ["x", "t", "both"])
def test_it_is_the_limit_of_differences(make, direction):
    adapter, bundle = make()
    x, t, cond, dx, dt = inputs(adapter)
    dx, dt = dx * (direction != "t"), 20 * dt * (direction != "x")
    v, tangent = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    with torch.no_grad():
        torch.testing.assert_close(v, adapter.forward("student", x, t, cond), rtol=0, atol=1e-5)
    expected = difference(adapter, x, t, cond, dx, dt)
    assert expected.abs().max() > 1e-2
    close(tangent, expected)
    assert not v.requires_grad
    assert not tangent.requires_grad
    assert all(p.grad is None for p in bundle["student"].modules["transformer"].parameters())


def test_attention_by_parts_is_the_whole(make, monkeypatch):
    adapter, _ = make()
    x, t, cond, dx, dt = inputs(adapter)
    full = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    # 18 tokens of two clips and two heads: five queries at a time.
    monkeypatch.setattr(forward_mode, "_MAX_SCORES", 5 * 2 * 2 * 18)
    parts = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    for a, b in zip(full, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"activation_checkpointing": True},
    {"lora": LoraSpec(rank=2)},
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_however_the_role_is_run(make, options):
    adapter, _ = make(**options)
    x, t, cond, dx, dt = inputs(adapter)
    _, tangent = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    expected = make()[0].forward_jvp("student", x, t, cond, dx=dx, dt=dt)[1]
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-6)


def test_compiled_blocks_run_as_they_are_written(make):
    adapter, bundle = make()
    x, t, cond, dx, dt = inputs(adapter)
    expected = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)[1]
    graphs = []
    for block in bundle["student"].modules["transformer"].blocks:
        block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    adapter.forward("student", x, t, cond)
    compiled = len(graphs)
    assert compiled > 0
    tangent = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)[1]
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-6)
    assert len(graphs) == compiled


def test_a_picture_does_not_move(make, folder_of):
    """The first frame is the condition's, at t = 0: the direction has no part there."""
    adapter, _ = make(config=VARIANTS["ti2v"].config, source=folder_of("ti2v"))
    x, t, cond, dx, dt = inputs(adapter)
    channels, _, height, width = adapter.latent_shape
    frame = torch.randn(2, channels, 1, height, width, generator=torch.Generator().manual_seed(1))
    cond = Condition({"image_latents": frame}).merged_onto(cond)
    _, tangent = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    close(tangent, difference(adapter, x, t, cond, dx, dt))
    dx[:, :, 0] = 1e3
    _, again = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    torch.testing.assert_close(tangent, again)


def test_a_causal_role_has_one_too(make):
    config = WanPipelineConfig(
        num_frames=9, height=32, width=48, max_sequence_length=6,
        causal=CausalConfig(roles=frozenset({"student"}), chunk_frames=1),
    )  # fmt: skip
    adapter, _ = make(config=config)
    x, t, cond, dx, dt = inputs(adapter)
    _, tangent = adapter.forward_jvp("student", x, t, cond, dx=dx, dt=dt)
    close(tangent, difference(adapter, x, t, cond, dx, dt))


def test_in_sixteen_bits_it_is_near(make):
    """bf16 has 8 bits: a correlation above 0.99 with the tangent in fp64."""
    adapter, exact = make(precision="bf16")[0], make()[0]
    x, t, cond, dx, dt = inputs(adapter)
    actual, expected = (
        a.forward_jvp("student", x.float(), t.float(), cond, dx=dx.float(), dt=20 * dt.float())[1]
        for a in (adapter, exact)
    )
    assert actual.dtype == torch.float32
    pair = torch.stack([actual.flatten(), expected.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.99


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_the_difference_that_a_method_takes_agrees(make, precision):
    """Over seeds; twice what was seen in either: h^2 of the third derivative, not rounding."""
    adapter, bundle = make()
    dtype = torch.float64 if precision == "fp64" else torch.float32
    bundle["student"].modules["transformer"].to(dtype)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, v = (torch.randn(3, *adapter.latent_shape, generator=generator) for _ in range(2))
        x, v, t = x.to(dtype), v.to(dtype), 1000 * torch.rand(3, generator=generator).to(dtype)
        cond = Condition({"text": torch.randn(3, 6, 16, generator=generator)})
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        _, exact = adapter.forward_jvp("student", x, t, cond, dx=s * v, dt=t)
        call = lambda x, t: adapter.forward("student", x, t, cond)  # noqa: E731, B023
        near = s * finite_difference(call, x, t, v, 0.1)
        error = (near - exact).norm() / exact.norm()
        assert float(error) < 4e-3
