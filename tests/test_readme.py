"""The examples of the README, and of the page that it sends a newcomer to, work."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FIRST_RUN = (ROOT / "docs" / "start" / "first-run.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_an_export_is_sampled_as_the_first_run_says(tmp_path, monkeypatch):
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_protocols import ExportRequest, RoleSpec, SamplerSpec

    config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
    source = str(ROOT / "configs" / "tiny" / "wan")
    role = RoleSpec(name="student", path=source, trainable=False)
    spec = SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True)
    folder = tmp_path / "outputs" / "tiny-dmd2" / "student"
    exporter = PLUGIN.exporter(config, source=source)
    exporter.export(role, PLUGIN.weights(source), folder, ExportRequest(sampler=spec))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", FIRST_RUN, re.DOTALL)
    scope: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "first-run.md", "exec"), scope)
    assert scope["frames"].shape == (9, 32, 32, 3)
    assert scope["pipe"].scheduler.timesteps.tolist() == [1000.0, 700.0]


def test_the_run_file_in_the_readme_holds_only_keys_that_exist(tmp_path):
    from distill_runfile.read import read_config

    (text,) = re.findall(r"```yaml\n(# run.yaml.*?)```", README, re.DOTALL)
    file = tmp_path / "run.yaml"
    file.write_text(text)
    config = read_config(file, planning=True, world_size=8)
    assert config.missing  # data and weights; nothing is wrong
