"""The report callback and a stop: all of it or nothing. Whole reports: tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
import torch
from distill_evaluation.config import ReportConfig, ReportEntry
from distill_evaluation.distances import DistanceReference
from distill_evaluation.plugins import report as plugin
from distill_evaluation.report import CHUNK, ReportCallback
from distill_protocols import (
    DataError,
    ModelBundle,
    RoleHandle,
    RowGenerators,
    RunParts,
    RunState,
)
from distill_runtime import ALONE
from report_runs import CPU, JUDGE, Adapter, Conditioning, Method
from safetensors.torch import save_file
from torch import nn


def parts_of_a_run(
    folder: Path, real_latents: Path | None = None
) -> tuple[ReportCallback, RunState, Adapter]:
    bundle = ModelBundle({"student": RoleHandle(name="student", modules={"net": nn.Linear(1, 1)})})
    method, adapter = Method(bundle, None), Adapter()
    prompts = (JUDGE / "prompts.txt").read_text().splitlines()
    config = ReportConfig(
        judge=str(JUDGE), prompts=str(JUDGE / "prompts.txt"), clips_per_prompt=2,
        sheet_prompts=tuple(prompts[:2]),
        entries={"two": ReportEntry(role="student"), "again": ReportEntry(role="student")},
        real_latents=None if real_latents is None else str(real_latents), every_steps=1,
    )  # fmt: skip
    parts: Any = RunParts(
        method=method, adapter=adapter, conditioning=Conditioning(), exporter=None,
        output_dir=folder,
    )  # fmt: skip
    report = ReportCallback(config, parts)
    adapter.done.clear()
    run = RunState(
        method=method,
        loader=None,
        streams=method.streams,
        output_dir=folder,
        max_train_steps=1,
        ranks=ALONE,
    )  # type: ignore[arg-type]
    return report, run, adapter


def test_a_stop_ends_the_report_before_the_next_call_and_leaves_no_file(tmp_path, capsys):
    report, run, adapter = parts_of_a_run(tmp_path)
    report.on_train_end(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clips.mp4", "contact_sheet.png", "report", "report.json",
    ]  # fmt: skip
    full = list(adapter.done)
    clips = 2 * len(report.prompts)
    assert clips > CHUNK, "more than one chunk, or this shows nothing"
    assert full.count("call") > 8

    for position in (0, 1, 2, len(full) // 2, len(full) - 1):
        folder = tmp_path / f"stopped-{position}"
        folder.mkdir()
        report, run, adapter = parts_of_a_run(folder)
        poll = run.method.stop.poll
        # Asked for while the work before that position is done.
        run.method.stop.poll = lambda run=run, adapter=adapter, at=position, poll=poll: (
            run.request_stop("preempted") if len(adapter.done) >= at else None, poll(),
        )  # fmt: skip
        report.on_train_end(run)
        assert adapter.done == full[:position]
        assert list(folder.iterdir()) == []
        assert "report: left out, as the run was stopped (preempted)" in capsys.readouterr().out


def test_a_run_that_was_stopped_before_gets_no_report(tmp_path, capsys):
    report, run, adapter = parts_of_a_run(tmp_path)
    run.request_stop("preempted")
    report.on_train_end(run)
    assert adapter.done == []
    assert "left out, as the run was stopped (preempted)" in capsys.readouterr().out


def test_distances_are_of_the_clips_that_the_entry_samples(tmp_path, capsys):
    shape, prompts = Adapter().latent_shape, 40
    generator = torch.Generator().manual_seed(0)
    # Unlike unit noise, so that nothing is near: means, and a spread of half.
    raw = 1 + 2 * (0.5 * torch.randn(180, *shape, generator=generator) + 0.2)
    file = tmp_path / "real.safetensors"
    save_file({"latents": raw.half()}, file)
    (tmp_path / "out").mkdir()
    report, run, _ = parts_of_a_run(tmp_path / "out", file)
    assert len(report.prompts) == prompts
    report.on_step_end(run, cast("Any", SimpleNamespace(iteration=1)))
    report.on_train_end(run)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    first, again = written["entries"]

    real = (raw.half().float() - 1) / 2
    kept = DistanceReference.of_clips(torch.sigmoid(real[:100]), real[:100])
    noise = torch.cat([
        RowGenerators.seeded(1234, "report.measure", rows, CPU).normal(shape)
        for rows in (range(CHUNK), range(CHUNK, 80))
    ])  # fmt: skip
    expected = attrs.asdict(kept.distances(kept.features(torch.sigmoid(noise), noise)))
    assert first["distances"] == again["distances"] == pytest.approx(expected, rel=1e-6)
    assert first["distances"]["latent_std"] == pytest.approx(2, abs=0.01)
    rest = attrs.asdict(kept.distances(kept.features(torch.sigmoid(real[100:]), real[100:])))
    assert written["real"]["clips"] == 100
    assert {name: written["real"][name] for name in rest} == pytest.approx(rest, rel=1e-6)
    # Numbers that real clips have without a prompt are measured of them too.
    assert written["real"].keys() - rest.keys() == {
        "clips", "fd", "motion", "flow", "sharpness", "contrast", "saturation", "clipped",
    }  # fmt: skip
    assert rest["latent_std"] == pytest.approx(1, abs=0.01)
    for name, value in first["distances"].items():
        assert run.metrics[f"report/two/{name}"] == value
    names = plugin.metrics(report.config)
    assert {n for n in run.metrics if n.startswith("report/")} == set(names)
    assert first["metrics"] == {n: run.metrics[f"report/two/{n}"] for n in first["metrics"]}
    assert first["metrics"].keys() == written["metrics"].keys()
    assert "latent_std" in capsys.readouterr().out

    for wrong, why in ((raw[:80], "more than the 80"), (raw[..., :-1], r"there must be \[N, 3, ")):
        save_file({"latents": wrong.contiguous()}, file)
        with pytest.raises(DataError, match=why):
            parts_of_a_run(tmp_path, file)
    file.write_bytes(b"no")
    with pytest.raises(DataError, match="no safetensors file"):
        parts_of_a_run(tmp_path, file)


def test_seconds_a_clip_are_those_of_denoising_alone(tmp_path, monkeypatch, capsys):
    """By a clock that moves a second with each call of the model, and with each decoding."""
    report, run, adapter = parts_of_a_run(tmp_path)
    monkeypatch.setattr(
        "distill_evaluation.report.time",
        SimpleNamespace(perf_counter=lambda: float(len(adapter.done))),
    )
    report.on_train_end(run)
    entries = json.loads((tmp_path / "report.json").read_text())["entries"]
    clips = 2 * len(report.prompts)
    calls = -(-clips // CHUNK) * report.parts.method.sampler_spec.steps
    assert [entry["seconds_per_clip"] for entry in entries] == [calls / clips] * 2
