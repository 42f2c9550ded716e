"""An exported folder loads without a stray key and samples alike through stock diffusers code."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import weakref
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_diffusers.sampling.scheduler import SchedulerGrid, stock_schedule
from distill_protocols import (
    DTYPES,
    ExportRequest,
    OutputError,
    RoleError,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    TensorWeights,
    WeightsError,
    WeightSource,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

PROMPTS = ["a seven moving left", "a moving"]
ONE_STEP = SamplerSpec(steps=1)


def spec_of(folder):
    return RoleSpec(name="student", path=str(folder), trainable=True)


@pytest.fixture
def export(make_adapter, config, pipeline_template):
    """(write, adapter, bundle): ``write(folder, sampler, **request)`` exports the live student."""
    adapter, bundle = make_adapter(student=(True, "fp32"))
    exporter = PLUGIN.exporter(config, source=str(pipeline_template))

    def write(folder, sampler=ONE_STEP, *, ema=False, role=None, **request):
        role = role or spec_of(pipeline_template)
        request = ExportRequest(sampler=sampler, weights="ema" if ema else "live", **request)
        weights = bundle["student"].weight_sources(ema=ema)
        return exporter.export(role, weights, folder, request)

    return write, adapter, bundle


def stock_clips(folder, record, negative):
    """Clips [B, 3, F, H, W] of the stock pipeline, one by one, clip n from the seeds n and 100 + n:
    its scheduler draws from the global RNG, so that a batch would share one generator."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for n, prompt in enumerate(PROMPTS):
        with torch.random.fork_rng():
            torch.manual_seed(100 + n)
            clips += pipe(
                prompt,
                negative_prompt=negative,
                generator=torch.Generator().manual_seed(n),
                output_type="pt",
                **record["call"],
            ).frames
    return torch.stack(clips).permute(0, 2, 1, 3, 4)


def seeded(*seeds):
    return RowGenerators([torch.Generator().manual_seed(seed) for seed in seeds])


def our_clips(adapter, spec, negative, rows):
    """Sample the prompts of ``rows`` with the trainer's own sampler, in one batch."""
    latents = adapter.sample(
        "student",
        spec,
        seeded(*rows).normal(adapter.latent_shape),
        adapter.encode_condition([PROMPTS[n] for n in rows]),
        neg_cond=adapter.encode_neg_condition(negative),
        generators=seeded(*(100 + n for n in rows)),
    )
    return adapter.decode(latents)


SHIPPED = SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True)
"""Of the shipped student."""


@pytest.mark.parametrize(
    "spec",
    [
        SHIPPED,
        SamplerSpec(steps=1, stochastic=True),
        SamplerSpec(steps=2, shift=3.0, stochastic=True),
        SamplerSpec(steps=2, timesteps=(1000.0, 640.0), stochastic=True, guidance=2.0),
        SamplerSpec(steps=4, shift=5.0, stochastic=True),
        SamplerSpec(steps=3, timesteps=(1000.0, 757.0, 522.0), stochastic=True),
        SamplerSpec(steps=1),
        SamplerSpec(steps=2, shift=3.0, guidance=4.0),
        SamplerSpec(steps=4, shift=3.0, guidance=1.5),
        SamplerSpec(steps=16, shift=3.0, guidance=2.0),
        SamplerSpec(steps=1, solver="unipc"),
        SamplerSpec(steps=2, shift=5.0, guidance=2.0, solver="unipc"),
        SamplerSpec(steps=5, shift=3.0, guidance=5.0, solver="unipc"),
        SamplerSpec(steps=16, shift=8.0, solver="unipc"),
        SamplerSpec(steps=3, timesteps=(1000.0, 757.5, 522.0), solver="unipc"),
    ],
    ids=lambda s: f"{'stochastic' if s.stochastic else s.solver}-{s.steps}-w{s.guidance}",
)
def test_stock_pipeline_gives_the_same_clip_bit_for_bit(export, tmp_path, spec):
    write, adapter, _ = export
    record = write(tmp_path / "student", spec, max_shard_bytes=40_000)
    theirs = stock_clips(tmp_path / "student", record, "left")
    ours = torch.cat([our_clips(adapter, spec, "left", [n]) for n in range(len(PROMPTS))])
    assert ours.std() > 1e-3
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)
    assert torch.equal(ours, theirs)
    assert record["timestep_deviation"] == 0
    assert not [note for note in record["notes"] if "differ" in note]


@pytest.mark.parametrize("spec", [SHIPPED, SamplerSpec(steps=4, shift=3.0, guidance=1.5)])
def test_the_stock_pipeline_gives_the_same_batch_bit_for_bit(export, tmp_path, monkeypatch, spec):
    """The pipeline takes a generator a row. Its scheduler takes them too, but nobody hands them on:
    that much is done here."""
    from diffusers import WanPipeline

    write, adapter, _ = export
    record = write(tmp_path / "student", spec)
    pipe = WanPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    fresh = [torch.Generator().manual_seed(100 + n) for n in range(len(PROMPTS))]
    monkeypatch.setattr(pipe.scheduler, "step", partial(pipe.scheduler.step, generator=fresh))
    theirs = pipe(
        PROMPTS,
        negative_prompt="left",
        generator=[torch.Generator().manual_seed(n) for n in range(len(PROMPTS))],
        output_type="pt",
        **record["call"],
    ).frames.permute(0, 2, 1, 3, 4)
    assert torch.equal(our_clips(adapter, spec, "left", [0, 1]), theirs)


def test_the_shipped_model_gives_the_same_clip_bit_for_bit(tmp_path):
    """The tiny taught Wan that ships, whose clips show something."""
    folder = Path(__file__).parents[2] / "configs/tiny/wan"
    config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
    bundle = PLUGIN.load([spec_of(folder)], config, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, config, source=str(folder))
    exporter = PLUGIN.exporter(config, source=str(folder))
    weights = bundle["student"].weight_sources()
    for spec in (SHIPPED, SamplerSpec(steps=4, shift=3.0, guidance=2.0)):
        request = ExportRequest(sampler=spec)
        record = exporter.export(spec_of(folder), weights, tmp_path / "student", request)
        theirs = stock_clips(tmp_path / "student", record, "")
        ours = [our_clips(adapter, spec, "", [n]) for n in range(len(PROMPTS))]
        assert torch.equal(torch.cat(ours), theirs)


def test_every_part_loads_with_no_stray_key(export, config, tmp_path):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    write, _, bundle = export
    folder = tmp_path / "student"
    write(folder)
    for module, name in (
        (WanTransformer3DModel, "transformer"),
        (AutoencoderKLWan, "vae"),
        (UMT5EncoderModel, "text_encoder"),
    ):
        loaded, info = module.from_pretrained(folder, subfolder=name, output_loading_info=True)
        assert not any(info.values()), (name, info)
        if name == "transformer":
            live = bundle["student"].modules["transformer"].state_dict()
            assert all(torch.equal(v, live[k]) for k, v in loaded.state_dict().items())
    assert not list(PLUGIN.role_problems(spec_of(folder), config))


def test_ema_weights_are_written_and_live_ones_kept(export, config, tmp_path):
    class Zeros:
        def weights(self):
            live = bundle["student"].modules["transformer"].state_dict()
            return {k: torch.zeros_like(v) for k, v in live.items()}

    write, _, bundle = export
    with pytest.raises(RoleError, match="EMA"):
        write(tmp_path / "a", ema=True)
    assert list(tmp_path.iterdir()) == []
    bundle["student"].ema["transformer"] = Zeros()
    record = write(tmp_path / "b", ema=True)
    assert record["weights"] == "ema"
    loaded = PLUGIN.load([spec_of(tmp_path / "b")], config, device=torch.device("cpu"))
    assert all((p == 0).all() for p in loaded["student"].modules["transformer"].parameters())
    assert any(p.any() for p in bundle["student"].modules["transformer"].parameters())


@pytest.mark.parametrize("most", [1, 20_000, 60_000, 10**9])
def test_shards_and_index_are_those_of_diffusers(export, tmp_path, most):
    """Same files, same keys in each, same index, but for where in a file a tensor lies."""
    write, _, bundle = export
    transformer = bundle["student"].modules["transformer"]
    transformer.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    record = write(tmp_path / "ours", max_shard_bytes=most)
    ours = tmp_path / "ours" / "transformer"
    assert {f.name for f in ours.iterdir()} == {f.name for f in (tmp_path / "theirs").iterdir()}
    for file in (tmp_path / "theirs").iterdir():
        if file.suffix == ".safetensors":
            theirs, tensors = load_file(file), load_file(ours / file.name)
            assert theirs.keys() == tensors.keys()
            assert all(torch.equal(theirs[key], tensors[key]) for key in theirs)
            assert record["files"][f"transformer/{file.name}"] == (ours / file.name).stat().st_size
        elif "index" in file.name:
            assert json.loads(file.read_text()) == json.loads((ours / file.name).read_text())
    assert json.loads((ours / "config.json").read_text()).items() >= {"num_layers": 2}.items()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_load_as_the_wide_weights_would(export, tmp_path, precision):
    """``from_pretrained(torch_dtype=...)`` of the narrow export and of the wide one agree."""
    from diffusers import WanTransformer3DModel

    write, _, _ = export
    write(tmp_path / "wide")
    record = write(tmp_path / "narrow", precision=precision)
    assert record["precision"] == precision
    dtype = DTYPES[precision]
    wide, narrow = (
        WanTransformer3DModel.from_pretrained(
            tmp_path / name, subfolder="transformer", torch_dtype=dtype
        ).state_dict()
        for name in ("wide", "narrow")
    )
    assert {t.dtype for t in narrow.values()} == {dtype, torch.float32}
    assert all(wide[k].dtype == v.dtype and torch.equal(wide[k], v) for k, v in narrow.items())
    stored = load_file(tmp_path / "narrow/transformer/diffusion_pytorch_model.safetensors")
    assert {k: v.dtype for k, v in stored.items()} == {k: v.dtype for k, v in narrow.items()}


def test_values_beyond_fp16_are_refused(export, tmp_path):
    write, _, bundle = export
    with torch.no_grad():
        bundle["student"].modules["transformer"].proj_out.weight[0, 0] = 70000.0
    with pytest.raises(WeightsError, match=r"proj_out.*70000.*65504"):
        write(tmp_path / "s", precision="fp16")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "s", precision="bf16")


def test_the_spec_is_written_beside(export, tmp_path):
    write, _, _ = export
    spec = SamplerSpec(steps=2, timesteps=(1000.0, 640.0), stochastic=True, guidance=2.0)
    record = write(tmp_path / "s", spec)
    written = json.loads((tmp_path / "s/sampler_spec.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert SamplerSpec(**{**written["sampler"], "timesteps": (1000.0, 640.0)}) == spec
    # Twice, for readers of the sampler and for those that only want the times.
    assert written["sampler"]["timesteps"] == written["timesteps"] == [1000.0, 640.0]
    assert "negative prompt" in " ".join(record["notes"])


def test_a_role_that_trains_in_16_bits_is_warned_about(export, tmp_path, pipeline_template):
    write, _, _ = export
    role = attrs.evolve(spec_of(pipeline_template), precision="bf16")
    assert "bf16 rounding" in " ".join(write(tmp_path / "s", role=role)["notes"])


def test_older_transformers_can_name_the_tokenizer(export, tmp_path):
    write, _, _ = export
    write(tmp_path / "s")
    for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
        assert "TokenizersBackend" not in (tmp_path / "s" / file).read_text()


def test_an_older_export_is_replaced_and_nothing_else_is(export, tmp_path):
    write, _, _ = export
    folder = tmp_path / "s"
    write(folder)
    (tmp_path / f".s.{'0' * 32}.part" / "transformer").mkdir(parents=True)  # of a killed export
    write(folder, SamplerSpec(steps=2))
    assert json.loads((folder / "sampler_spec.json").read_text())["sampler"]["steps"] == 2
    assert list(tmp_path.iterdir()) == [folder]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    for taken in (other, other / "chapter1.tex"):
        with pytest.raises(OutputError, match="thesis"):
            write(taken)
    assert [p.name for p in other.iterdir()] == ["chapter1.tex"]


@pytest.mark.parametrize(
    "request_", [{}, {"format": "comfyui"}, {"format": "lora", "lora_rank": 2}]
)
def test_a_failed_export_leaves_nothing(export, tmp_path, monkeypatch, request_):
    """The weights cannot be written after some of them were."""
    write, _, bundle = export
    with torch.no_grad():
        bundle["student"].modules["transformer"].proj_out.weight.add_(1.0)

    def full(stage):
        assert any(file.stat().st_size > 64 for file in stage.rglob("*.safetensors"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill_runtime.files.make_readable", full)
    with pytest.raises(OutputError, match="No space"):
        write(tmp_path / "s", **request_)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_is_restored_if_the_new_one_cannot_replace_it(
    export, tmp_path, monkeypatch
):
    write, _, _ = export
    folder = tmp_path / "s"
    write(folder)
    real = Path.rename

    def rename(self, target):
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="No space"):
        write(folder, SamplerSpec(steps=2))
    assert json.loads((folder / "sampler_spec.json").read_text())["sampler"]["steps"] == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_broken_source_is_an_error_before_writing(make_adapter, pipeline, config, tmp_path):
    _, bundle = make_adapter(source=pipeline, student=(True, "fp32"))
    (pipeline / "vae/diffusion_pytorch_model.safetensors").unlink()
    exporter = PLUGIN.exporter(config, source=str(pipeline))
    weights = bundle["student"].weight_sources()
    request = ExportRequest(sampler=ONE_STEP)
    with pytest.raises(WeightsError, match="vae"):
        exporter.export(spec_of(pipeline), weights, tmp_path / "s", request)
    assert not (tmp_path / "s").exists()


def test_weights_of_another_model_are_refused(export, config, pipeline_template, tmp_path):
    _, _, bundle = export
    exporter = PLUGIN.exporter(config, source=str(pipeline_template))
    role, request = spec_of(pipeline_template), ExportRequest(sampler=ONE_STEP)
    state = bundle["student"].modules["transformer"].state_dict()
    wrong = {
        "proj_out.bias": {k: v for k, v in state.items() if k != "proj_out.bias"},
        "extra.weight": {**state, "extra.weight": torch.zeros(2)},
        r"patch_embedding\.bias \[3\]": {**state, "patch_embedding.bias": torch.zeros(3)},
    }
    for message, tensors in wrong.items():
        weights = {"transformer": TensorWeights("role 'student'", tensors)}
        with pytest.raises(WeightsError, match=message):
            exporter.export(role, weights, tmp_path / "s", request)
    with pytest.raises(WeightsError, match="weights of nothing"):
        exporter.export(role, {}, tmp_path / "s", request)
    assert list(tmp_path.iterdir()) == []


# -- the scheduler's timesteps --------------------------------------------------------------------


@given(st.integers(1, 50), st.floats(0.2, 15.0), st.booleans())
def test_every_shifted_grid_is_reached(steps, shift, stochastic):
    """Within fp32's own error at 1000, about 1e-4."""
    spec = SamplerSpec(steps=steps, shift=shift, stochastic=stochastic)
    schedule = stock_schedule(spec)
    scheduler = schedule.scheduler()
    scheduler.set_timesteps(steps)
    exact = torch.tensor([1000 * s for s in spec.sigmas()])
    assert (scheduler.timesteps - exact).abs().max() < 1e-3
    assert scheduler.sigmas[-1] == 0
    assert schedule.deviation < 1e-3


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 12.0])
def test_customary_grids_are_reached_bit_for_bit(shift):
    for steps in (*range(1, 17), 20, 25, 30, 32, 40, 50):
        spec = SamplerSpec(steps=steps, shift=shift)
        scheduler = stock_schedule(spec).scheduler()
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas.tolist() == torch.tensor([*spec.sigmas(), 0.0]).tolist(), steps


@given(st.integers(2, 50), st.floats(0.05, 31.0), st.floats(0.001, 0.99))
def test_the_schedulers_arithmetic_is_known_to_the_last_bit(steps, shift, terminal):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    scheduler.set_timesteps(steps)
    ours = torch.tensor(SchedulerGrid().sigmas(steps, shift, terminal), dtype=torch.float32)
    assert torch.equal(scheduler.sigmas[:-1], ours)


@given(st.floats(1.0, 999.0))
def test_any_second_timestep_is_reached(t):
    assert stock_schedule(SamplerSpec(steps=2, timesteps=(1000.0, t))).deviation == 0


def test_unreachable_timesteps_are_measured_and_noted(export, tmp_path):
    write, _, _ = export
    spec = SamplerSpec(steps=2, timesteps=(950.0, 500.0))
    assert stock_schedule(spec).deviation == pytest.approx(50)
    record = write(tmp_path / "s", spec)
    assert "differ" in record["notes"][0]
    low = attrs.evolve(spec, timesteps=(1000.0, 500.0), guidance=0.5)
    record = write(tmp_path / "s", low)
    assert "guidance_scale 0.5" in record["notes"][0]


class Watched(WeightSource):
    """Weights that note how many of their tensors are alive when the next is asked for."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights = weights
        self.alive = weakref.WeakSet()
        self.most = 0

    @property
    def where(self) -> str:
        return self.weights.where

    def describe(self):
        return self.weights.describe()

    def read(self, names):
        self.most = max(self.most, len(self.alive))
        tensors = {name: tensor.clone() for name, tensor in self.weights.read(names).items()}
        for tensor in tensors.values():
            self.alive.add(tensor)
        return tensors


@pytest.mark.parametrize("format_", ["diffusers", "comfyui"])
def test_an_export_holds_one_tensor_at_a_time(export, config, pipeline_template, tmp_path, format_):
    """Of 14 billion parameters two copies would not fit where one does."""
    _, _, bundle = export
    exporter = PLUGIN.exporter(config, source=str(pipeline_template))
    watched = {key: Watched(source) for key, source in bundle["student"].weight_sources().items()}
    request = ExportRequest(sampler=ONE_STEP, format=format_)
    exporter.export(spec_of(pipeline_template), watched, tmp_path / "s", request)
    assert len(watched["transformer"].describe()) > 20
    assert watched["transformer"].most <= 1


class _Killing(Watched):
    """Weights whose reader is killed at the tenth tensor."""

    reads = 0

    def read(self, names):
        self.reads += 1
        if self.reads == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(names)


def test_a_killed_export_leaves_the_older_one_and_is_gone_on_with(
    export, config, pipeline_template, tmp_path
):
    write, _, bundle = export
    write(tmp_path / "s", SamplerSpec(steps=2))
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    exporter = PLUGIN.exporter(config, source=str(pipeline_template))
    weights = {key: _Killing(s) for key, s in bundle["student"].weight_sources().items()}
    request = ExportRequest(sampler=ONE_STEP)
    child = multiprocessing.get_context("fork").Process(
        target=exporter.export,
        args=(spec_of(pipeline_template), weights, tmp_path / "s", request),
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before
    assert len(list(tmp_path.glob(".s.*.part"))) == 1  # what was half written
    write(tmp_path / "s")
    write(tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "t"]
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in paths if p.is_file()}
        for name, paths in ((n, list((tmp_path / n).rglob("*"))) for n in "st")
    }
    assert files["s"] == files["t"]
