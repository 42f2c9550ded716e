"""Invariants 2, 4 and 14 with real models: random shapes, the tiny Wan, real run files."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_diffusers.calls import flow
from distill_protocols import Condition, ConfigError, RoleSpec
from distill_runfile.read import read_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
seeds = st.integers(0, 2**32 - 1)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(seeds, st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]))
def test_2_noise_ends_are_exact(seed, batch, dtype):
    x0 = randn(batch, 2, 3, 4, 4, seed=seed, dtype=dtype)
    noise = randn(batch, 2, 3, 4, 4, seed=seed + 1, dtype=dtype)
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(batch)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.full((batch,), 1000.0)), noise)


@pytest.fixture(scope="module")
def wan():
    config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
    spec = RoleSpec(name="student", path=str(TINY / "wan"), trainable=True)
    bundle = PLUGIN.load([spec], config, device=torch.device("cpu"))
    return bundle, PLUGIN.adapter(bundle, config, source=str(TINY / "wan"))


def inputs(adapter, batch: int, seed: int):
    x = randn(batch, *adapter.latent_shape, seed=seed)
    t = 1000 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    cond = Condition({"text": randn(batch, 8, 64, seed=seed + 1)})
    return x, t, cond, Condition({"text": randn(1, 8, 64, seed=seed + 2)})


@settings(max_examples=8)
@given(seeds, st.integers(1, 3))
def test_4_guidance_of_one_is_conditional_and_of_zero_unconditional(wan, seed, batch):
    _, adapter = wan
    x, t, cond, neg = inputs(adapter, batch, seed)
    with torch.no_grad():
        conditional = adapter.forward("student", x, t, cond)
        unconditional = adapter.forward("student", x, t, neg)
        assert torch.equal(
            adapter.forward("student", x, t, cond, neg_cond=neg, cfg=1.0), conditional
        )
        assert torch.equal(
            adapter.forward("student", x, t, cond, neg_cond=neg, cfg=0.0), unconditional
        )
        w = 1 + (seed % 50) / 10
        guided = adapter.forward("student", x, t, cond, neg_cond=neg, cfg=w)
    expected = w * conditional - (w - 1) * unconditional
    assert torch.allclose(guided, expected, atol=2e-4 * max(1.0, w))


def sections(values, path=()):
    """Yield every mapping in a run file whose keys are fixed."""
    if isinstance(values, dict):
        free = path in ((), ("models",), ("callbacks",), ("validation", "views"))
        if not free and path[-1:] != ("entries",):
            yield path
        for key, value in values.items():
            yield from sections(value, (*path, key))


RUN = yaml.safe_load((TINY / "dmd2.yaml").read_text())
for _role in RUN["models"].values():
    _role["path"] = str(TINY / "wan")
RUN["data"]["path"] = str(TINY / "data")
RUN["training"]["optimizer"]["lr"] = 4e-4
RUN["models"]["critic"]["optimizer"]["lr"] = 6e-4
RUN["callbacks"]["report"] |= {
    "judge": str(TINY / "judge"),
    "prompts": str(TINY / "judge" / "prompts.txt"),
}
SECTIONS = sorted(sections(RUN))


@functools.cache
def accepted_keys(section) -> set[str]:
    """Return the keys that a section accepts, read from its error about an unknown one."""
    values = copy.deepcopy(RUN)
    target = values
    for part in section:
        target = target[part]
    target["no_such_key"] = 1
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError) as excinfo:
            read_config(file)
    (problem,) = (f for f in excinfo.value.problems if "no_such_key" in f)
    return set(problem.split("accepts: ")[1].rstrip(")").split(", "))


@settings(max_examples=10)
@given(st.sampled_from(SECTIONS), st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_14_an_unknown_key_anywhere_is_a_problem_that_names_it(tmp_path_factory, section, key):
    values = copy.deepcopy(RUN)
    target = values
    for part in section:
        target = target[part]
    assume(key not in accepted_keys(section))
    target[key] = 1
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as excinfo:
        read_config(file)
    named = f"{'.'.join((*section, key))}: unknown key"
    assert any(named in problem for problem in excinfo.value.problems)
