"""A Wan student that is told the time that a call leads to: loaded, planned, sampled, exported to
diffusers' AnyFlow, and trained by the formula of its papers.

The stock ``AnyFlowTransformer3DModel`` with the student's weights is the independent model here.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel
from diffusers.pipelines.anyflow.pipeline_anyflow import AnyFlowPipeline
from distill_adapters_wan import PLUGIN
from distill_methods import (
    FlowMap,
    FlowMapConfig,
    FlowMapDMDConfig,
    FlowMapDMDMethod,
    FlowMapMethod,
)
from distill_protocols import (
    Batch,
    Condition,
    ContractError,
    ExportRequest,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
    TargetTimeSpec,
    TensorWeights,
)
from method_cases import SHAPE, Conditioning, gradients, normal
from wan_variants import VARIANTS

CPU = torch.device("cpu")
CONFIG = VARIANTS["t2v"].config
TEXT = Condition({"text": normal(2, 6, 16, seed=3)})


def student(folder: Path, **options: Any) -> RoleSpec:
    return RoleSpec(
        name="student",
        path=str(folder),
        trainable=True,
        target_time=TargetTimeSpec(gate=0.25),
        **options,
    )


@pytest.fixture(scope="module")
def folder(folder_of: Any) -> Path:
    return Path(folder_of("t2v"))


def build(folder: Path, *, moved: float = 0.05) -> Any:
    teacher = RoleSpec(name="teacher", path=str(folder), trainable=False)
    bundle = PLUGIN.load([student(folder), teacher], CONFIG, device=CPU)
    module = bundle["student"].modules["transformer"]
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        if moved and "norm" not in name:
            parameter.data.add_(normal(*parameter.shape, seed=seed), alpha=moved)
    return PLUGIN.adapter(bundle, CONFIG, source=str(folder)), bundle


def export(bundle: Any, folder: Path, to: Path, sampler: SamplerSpec) -> Any:
    exporter = PLUGIN.exporter(CONFIG, source=str(folder))
    weights = {
        name: TensorWeights(name, module.state_dict())
        for name, module in bundle["student"].modules.items()
    }
    request = ExportRequest(format="diffusers", sampler=sampler)
    record = exporter.export(student(folder), weights, to, request)
    exporter.verify(student(folder), weights, to, request)
    return record


def test_it_begins_as_the_teacher_and_is_planned_as_it_is_loaded(folder: Path):
    adapter, bundle = build(folder, moved=0)
    module = bundle["student"].modules["transformer"]
    second = "condition_embedder.delta_embedder."
    for name, value in module.condition_embedder.time_embedder.state_dict().items():
        copy = module.state_dict()[second + name]
        assert torch.equal(copy, value)
        assert copy.data_ptr() != value.data_ptr()
    planned = PLUGIN.plan(student(folder), CONFIG).modules[0].tensors
    assert [t.name for t in planned] == [name for name, _ in module.named_parameters()]
    x, t = normal(2, *SHAPE), torch.tensor([700.0, 90.0])
    with torch.no_grad():
        calls = [adapter.forward(role, x, t, TEXT) for role in ("student", "teacher")]
    torch.testing.assert_close(*calls, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [
        (SamplerSpec(steps=1), 1e-5),
        (SamplerSpec(steps=4, shift=3.0), 1e-5),
        (SamplerSpec(steps=2, timesteps=(1000.0, 612.5)), 1e-5),
    ],
)
def test_stock_classes_sample_the_export_as_the_adapter(
    folder: Path, tmp_path: Path, sampler: SamplerSpec, tolerance: float
):
    """Not bit for bit: stock code rotates in complex fp64 and takes times in fp64."""
    adapter, bundle = build(folder)
    record = export(bundle, folder, tmp_path / "student", sampler)
    assert record["timestep_deviation"] < 1e-3
    pipeline = AnyFlowPipeline.from_pretrained(tmp_path / "student", text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(2, *SHAPE, seed=8)
    call = {k: v for k, v in record["call"].items() if k not in ("max_sequence_length",)}
    theirs = pipeline(
        prompt_embeds=TEXT.tensors["text"], latents=noise, output_type="latent", **call
    ).frames
    ours = adapter.sample("student", sampler, noise, TEXT)
    assert float((ours - theirs).abs().max()) < tolerance * float(ours.abs().max())
    blind = adapter.forward("student", noise, torch.full((2,), 1000.0), TEXT)
    step = adapter.sample("student", SamplerSpec(steps=1), noise, TEXT)
    assert not torch.allclose(noise - blind, step, atol=1e-3)  # the second time is read


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_the_loss_is_that_of_the_papers(folder: Path, tmp_path: Path, velocity: str):
    """From the stock transformer, with draws and formula written out here."""
    adapter, bundle = build(folder)
    flow_map = FlowMap(velocity=velocity, guidance_scale=2.0, difference=3.0)
    config = FlowMapConfig(flow_map=flow_map)
    method = FlowMapMethod(
        bundle, adapter, config, conditioning=Conditioning(6), streams=RandomStreams(5)
    )
    text = normal(6, 6, 16, seed=1)
    batch = Batch(
        latents=normal(6, *SHAPE, seed=2), cond=Condition({"text": text}), ids=tuple("abcdef")
    )
    result = method.single_train_step(batch, 1)
    result.loss_map["total_loss"].backward()
    actual = gradients(method)["student.transformer"]

    export(bundle, folder, tmp_path / "student", SamplerSpec(steps=1))
    net = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "student" / "transformer").train()
    column = lambda value: value.view(-1, 1, 1, 1, 1)  # noqa: E731

    def u(x: Any, s: Any, s_r: Any, text: Any = text) -> Any:
        times = [(1000 * v)[:, None].expand(-1, x.shape[2]) for v in (s, s_r)]
        (out,) = net(x.transpose(1, 2), *times, text, return_dict=False)
        return out.transpose(1, 2)

    streams, shifted = RandomStreams(5), lambda v: 5 * v / (1 + 4 * v)
    a, b = (shifted(streams.rows(f"flow_map.{n}", 6).uniform()) for n in ("t", "target_t"))
    s, s_r = torch.maximum(a, b), torch.minimum(a, b)
    kind = streams.rows("flow_map.interval", 6).uniform()
    s_r = torch.where(kind < 0.5, s, torch.where(kind < 0.75, torch.zeros(6), s_r))
    assert len({float(v) for v in s_r}) > 3
    x0 = adapter.normalize_latents(batch.latents)
    eps = streams.rows("flow_map.noise", 6).normal(SHAPE)
    x = column(1 - s) * x0 + column(s) * eps
    negative = torch.full((6, 6, 16), 0.3)
    with torch.no_grad():
        if velocity == "teacher":
            teacher = bundle["teacher"].modules["transformer"]
            c, n = (teacher(x, 1000 * s, y, return_dict=False)[0] for y in (text, negative))
            v = 2 * c - n
        else:
            v = 2 * (eps - x0) - u(x, s, s, negative)
        h = 0.003
        up, down = (s + h).clamp(max=1), (s - h).clamp(min=0)
        change = u(x + column(up - s) * v, up, s_r) - u(x + column(down - s) * v, down, s_r)
        target = v - column(s - s_r) * change / column(up - down)
    d = (u(x, s, s_r) - target).square().flatten(1).mean(dim=1)
    expected = (15 / 4 * s * (1 - s).sqrt() * d / (d.detach() + 1e-3)).mean()
    torch.testing.assert_close(result.loss_map["total_loss"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.outputs["flow_map_error"], d.mean(), rtol=1e-4, atol=0)
    expected.backward()
    of_net = dict(net.named_parameters())
    names = [name for name, _ in bundle["student"].modules["transformer"].named_parameters()]
    theirs = torch.cat([of_net[name].grad.flatten() for name in names])
    assert (actual - theirs).norm() < 1e-3 * theirs.norm()


def test_the_second_stage_starts_from_an_export(folder: Path, tmp_path: Path):
    """``models.student.init_from``: every weight, those of the second time embedder too."""
    _, bundle = build(folder)
    out, role = tmp_path / "student", student(folder)
    export(bundle, folder, out, SamplerSpec(steps=1))
    assert not list(PLUGIN.start_problems(role, CONFIG, str(out)))
    assert not list(PLUGIN.weights_problems(role, str(out)))
    weights = {"student": PLUGIN.start_weights(role, str(out))}
    again = PLUGIN.load([role], CONFIG, device=CPU, weights=weights)
    expected = bundle["student"].modules["transformer"].state_dict()
    for name, value in again["student"].modules["transformer"].state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_rollout_is_three_calls_of_which_all_learn(folder: Path):
    """From noise to t_k, from there to t_{k+1}, and from there to the clip; the first and the last
    step have one call less."""
    roles = [student(folder), *(RoleSpec(name=n, path=str(folder), trainable=n == "critic")
                                for n in ("teacher", "critic"))]  # fmt: skip
    bundle = PLUGIN.load(roles, CONFIG, device=CPU)
    adapter = PLUGIN.adapter(bundle, CONFIG, source=str(folder))
    config = FlowMapDMDConfig(rollout_steps=(3,), student_sampler=SamplerSpec(steps=1, shift=1.0))
    method = FlowMapDMDMethod(
        bundle, adapter, config, conditioning=Conditioning(6), streams=RandomStreams(1)
    )
    batch = Batch(latents=normal(2, *SHAPE, seed=2), cond=TEXT, ids=("a", "b"))
    streams, seen = RandomStreams(1), set()
    for _ in range(8):
        rollout = method._matching._rollout(batch, "student", 1)
        k = int(rollout.exits)
        seen.add(k)
        x = streams.rows("flow_map_dmd.student.rollout", 2).normal(SHAPE)
        times = sorted({1000.0, 1000 - 1000 * k / 3, 1000 - 1000 * (k + 1) / 3, 0.0}, reverse=True)
        for t, target_t in itertools.pairwise(times):
            ends = (torch.full((2,), value) for value in (t, target_t))
            x = x - (t - target_t) / 1000 * adapter.forward_to("student", x, *ends, TEXT)
        torch.testing.assert_close(rollout.x0, x, rtol=1e-4, atol=1e-5)
        embedder = bundle["student"].modules["transformer"].condition_embedder.delta_embedder
        (gradient,) = torch.autograd.grad(rollout.x0.sum(), [embedder.linear_1.weight])
        assert gradient.any()
    assert seen == {0, 1, 2}


def test_what_a_flow_map_cannot_be_is_said(folder: Path):
    adapter, _ = build(folder)
    x, t = normal(2, *SHAPE), torch.tensor([700.0, 90.0])
    with pytest.raises(ContractError, match="was loaded without a second time embedder"):
        adapter.forward_to("teacher", x, t, t, TEXT)
    for spec in (SamplerSpec(steps=2, stochastic=True), SamplerSpec(steps=2, solver="unipc")):
        with pytest.raises(ContractError, match="'student' is a flow map"):
            adapter.sample("student", spec, x, TEXT)
    request = ExportRequest(format="comfyui", sampler=SamplerSpec(steps=1))
    (problem,) = PLUGIN.export_problems(student(folder), request)
    assert "no place for the second time embedder" in problem.message
    image = evolve(request, format="diffusers")
    assert not list(PLUGIN.export_problems(student(folder), image))
