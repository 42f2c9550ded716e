"""The examples of the README work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(word: str) -> str:
    (match,) = (text for text in BLOCKS if word in text)
    return match


def test_a_method_in_forty_lines(tmp_path, monkeypatch):
    text = block("class MatchTeacher")
    assert len([line for line in text.splitlines() if line.strip()]) <= 40
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), scope)
    losses = (tmp_path / "outputs" / "match" / "metrics.jsonl").read_text().splitlines()
    assert len(losses) == 20
    net, teacher = scope["net"], scope["teacher"]
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (net(x) - teacher(x)).square().mean() < 0.1 * teacher(x).square().mean()


def test_an_export_is_sampled_as_the_readme_says(tmp_path, monkeypatch):
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
    scope: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(block("WanPipeline.from_pretrained"), "README.md", "exec"), scope)
    assert scope["frames"].shape == (9, 32, 32, 3)
    assert scope["pipe"].scheduler.timesteps.tolist() == [1000.0, 700.0]


def test_the_run_file_in_the_readme_holds_only_keys_that_exist(tmp_path):
    from distill_protocols import ConfigError
    from distill_runfile.read import read_config

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as excinfo:
        read_config(file, planning=True)
    # The folder of the teacher is an example; nothing else may be wrong.
    assert all("models.teacher.path" in problem for problem in excinfo.value.problems)
