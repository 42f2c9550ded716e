"""An exported folder loads without a stray key and samples alike through stock diffusers code."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN, stock_schedule
from distill_protocols import OutputError, RoleError, RoleSpec, SamplerSpec, WeightsError
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = ["a seven moving left", "a moving"]


def spec_of(folder):
    return RoleSpec(name="student", path=str(folder), trainable=True)


@pytest.fixture
def export(make_adapter, config, pipeline_template):
    adapter, bundle = make_adapter(student=(True, "fp32"))
    exporter = PLUGIN.exporter(bundle, config, source=str(pipeline_template))
    return exporter, adapter, bundle


def stock_clips(folder, facts, noise_seed, fresh_seed, negative):
    """Clips [B, 3, F, H, W] of the stock pipeline; its scheduler draws from the global RNG."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        torch.manual_seed(fresh_seed)
        frames = pipe(
            PROMPTS,
            negative_prompt=negative,
            generator=torch.Generator().manual_seed(noise_seed),
            output_type="pt",
            **facts["call"],
        ).frames
    return frames.permute(0, 2, 1, 3, 4)


@pytest.mark.parametrize(
    "spec",
    [
        SamplerSpec(steps=1, stochastic=True),
        SamplerSpec(steps=2, shift=3.0, stochastic=True),
        SamplerSpec(steps=2, timesteps=(1000.0, 640.0), stochastic=True, guidance=2.0),
        SamplerSpec(steps=4, shift=5.0, stochastic=True),
        SamplerSpec(steps=3, timesteps=(1000.0, 757.0, 522.0), stochastic=True),
        SamplerSpec(steps=1),
        SamplerSpec(steps=2, shift=3.0, guidance=4.0),
        SamplerSpec(steps=4, shift=3.0, guidance=1.5),
        SamplerSpec(steps=16, shift=3.0, guidance=2.0),
    ],
    ids=lambda s: f"{'stochastic' if s.stochastic else 'ode'}-{s.steps}-w{s.guidance}",
)
def test_stock_pipeline_gives_the_same_clip(export, tmp_path, spec):
    exporter, adapter, _ = export
    folder = tmp_path / "student"
    facts = exporter("student", str(folder), sampler=spec, ema=False)
    theirs = stock_clips(folder, facts, 11, 12, "left")
    noise = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(11))
    latents = adapter.sample(
        "student",
        spec,
        noise,
        adapter.encode_condition(PROMPTS),
        neg_cond=adapter.encode_neg_condition("left"),
        generator=torch.Generator().manual_seed(12),
    )
    ours = adapter.decode(latents)
    assert ours.std() > 1e-3
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)
    assert (ours - theirs).abs().max() <= 1e-5
    assert facts["timestep_deviation"] < 1e-3


def test_every_part_loads_with_no_stray_key(export, config, tmp_path):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    exporter, _, bundle = export
    folder = tmp_path / "student"
    exporter("student", str(folder), sampler=SamplerSpec(steps=2), ema=False)
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
    assert PLUGIN.faults(spec_of(folder), config) == []


def test_ema_weights_are_written_and_live_ones_kept(export, config, tmp_path):
    class Zeros:
        @contextlib.contextmanager
        def swapped_in(self, module):
            live = {k: v.clone() for k, v in module.state_dict().items()}
            module.load_state_dict({k: torch.zeros_like(v) for k, v in live.items()})
            yield
            module.load_state_dict(live)

    exporter, _, bundle = export
    with pytest.raises(RoleError, match="EMA"):
        exporter("student", str(tmp_path / "a"), sampler=SamplerSpec(steps=1), ema=True)
    assert list(tmp_path.iterdir()) == []
    bundle["student"].ema["transformer"] = Zeros()
    facts = exporter("student", str(tmp_path / "b"), sampler=SamplerSpec(steps=1), ema=True)
    assert facts["weights"] == "ema"
    loaded = PLUGIN.load([spec_of(tmp_path / "b")], config, device=torch.device("cpu"))
    assert all((p == 0).all() for p in loaded["student"].modules["transformer"].parameters())
    assert any(p.any() for p in bundle["student"].modules["transformer"].parameters())


def test_the_spec_is_written_beside(export, tmp_path):
    exporter, _, _ = export
    spec = SamplerSpec(steps=2, timesteps=(1000.0, 640.0), stochastic=True, guidance=2.0)
    facts = exporter("student", str(tmp_path / "s"), sampler=spec, ema=False)
    written = json.loads((tmp_path / "s/sampler_spec.json").read_text())
    assert written == json.loads(json.dumps(facts))
    assert SamplerSpec(**{**written["sampler"], "timesteps": (1000.0, 640.0)}) == spec
    assert "negative prompt" in " ".join(facts["notes"])


def test_older_transformers_can_name_the_tokenizer(export, tmp_path):
    exporter, _, _ = export
    exporter("student", str(tmp_path / "s"), sampler=SamplerSpec(steps=1), ema=False)
    for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
        assert "TokenizersBackend" not in (tmp_path / "s" / file).read_text()


def test_an_older_export_is_replaced_and_nothing_else_is(export, tmp_path):
    exporter, _, _ = export
    folder = tmp_path / "s"
    exporter("student", str(folder), sampler=SamplerSpec(steps=1), ema=False)
    exporter("student", str(folder), sampler=SamplerSpec(steps=2), ema=False)
    assert json.loads((folder / "sampler_spec.json").read_text())["sampler"]["steps"] == 2
    assert list(tmp_path.iterdir()) == [folder]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    with pytest.raises(OutputError, match="thesis"):
        exporter("student", str(other), sampler=SamplerSpec(steps=1), ema=False)
    assert [p.name for p in other.iterdir()] == ["chapter1.tex"]


def test_a_failed_export_leaves_nothing(export, tmp_path, monkeypatch):
    exporter, _, bundle = export

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle["student"].modules["transformer"], "save_pretrained", full)
    with pytest.raises(OutputError, match="No space"):
        exporter("student", str(tmp_path / "s"), sampler=SamplerSpec(steps=1), ema=False)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_is_put_back_when_the_new_one_cannot_take_its_place(
    export, tmp_path, monkeypatch
):
    exporter, _, _ = export
    folder = tmp_path / "s"
    exporter("student", str(folder), sampler=SamplerSpec(steps=1), ema=False)
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="No space"):
        exporter("student", str(folder), sampler=SamplerSpec(steps=2), ema=False)
    assert json.loads((folder / "sampler_spec.json").read_text())["sampler"]["steps"] == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_broken_source_is_told_before_writing(make_adapter, pipeline, config, tmp_path):
    _, bundle = make_adapter(source=pipeline, student=(True, "fp32"))
    (pipeline / "vae/diffusion_pytorch_model.safetensors").unlink()
    exporter = PLUGIN.exporter(bundle, config, source=str(pipeline))
    with pytest.raises(WeightsError, match="vae"):
        exporter("student", str(tmp_path / "s"), sampler=SamplerSpec(steps=1), ema=False)
    assert not (tmp_path / "s").exists()


# -- the scheduler's timesteps --------------------------------------------------------------------


@given(st.integers(1, 50), st.floats(0.2, 15.0), st.booleans())
def test_every_shifted_grid_is_met(steps, shift, stochastic):
    """Within fp32's own error at 1000, about 1e-4."""
    spec = SamplerSpec(steps=steps, shift=shift, stochastic=stochastic)
    schedule = stock_schedule(spec)
    made = schedule.scheduler()
    made.set_timesteps(steps)
    exact = torch.tensor([1000 * s for s in spec.sigmas()])
    assert (made.timesteps - exact).abs().max() < 1e-3
    assert made.sigmas[-1] == 0
    assert schedule.deviation < 1e-3


@given(st.floats(1.0, 999.0))
def test_any_second_timestep_is_met(t):
    assert stock_schedule(SamplerSpec(steps=2, timesteps=(1000.0, t))).deviation < 1e-3


def test_what_cannot_be_met_is_measured_and_noted(export, tmp_path):
    exporter, _, _ = export
    spec = SamplerSpec(steps=2, timesteps=(950.0, 500.0))
    assert stock_schedule(spec).deviation == pytest.approx(50)
    facts = exporter("student", str(tmp_path / "s"), sampler=spec, ema=False)
    assert "differ" in facts["notes"][0]
    low = attrs.evolve(spec, timesteps=(1000.0, 500.0), guidance=0.5)
    facts = exporter("student", str(tmp_path / "s"), sampler=low, ema=False)
    assert "guidance_scale 0.5" in facts["notes"][0]
