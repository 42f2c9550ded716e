"""The report callback and a stop: all of it or nothing. Whole reports: tests/end_to_end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_evaluation.config import ReportConfig, ReportEntry
from distill_evaluation.judge import Judge
from distill_evaluation.report import CHUNK, ReportCallback
from distill_protocols import Condition, ModelBundle, RoleHandle, RunParts, RunState, SamplerSpec
from distill_runtime import ALONE, DistillMethod
from torch import Tensor, nn

JUDGE = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "judge"


class Method(DistillMethod[None]):
    def single_train_step(self, batch: Any, iteration: int) -> Any:
        raise NotImplementedError

    def get_optimizers(self, iteration: int) -> Any:
        raise NotImplementedError

    @property
    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(steps=2)


class Adapter:
    """Latents are pixels; a sample is its noise. Counts what it was asked to do."""

    def __init__(self) -> None:
        judge = Judge.load(JUDGE).network.config
        self.latent_shape = (3, judge.frames, judge.height, judge.width)
        self.done: list[str] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.done.append("decode")
        return torch.sigmoid(latents)

    def sample(
        self, role: str, spec: SamplerSpec, noise: Tensor, cond: Condition, *,
        poll: Callable[[], None], **_: Any,
    ) -> Tensor:  # fmt: skip
        for _ in range(spec.steps):
            poll()
            self.done.append("call")
        return noise


class Conditioning:
    def encode(self, prompts: Sequence[str], images: object = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), 1)})


def parts_of_a_run(folder: Path) -> tuple[ReportCallback, RunState, Adapter]:
    bundle = ModelBundle({"student": RoleHandle(name="student", modules={"net": nn.Linear(1, 1)})})
    method, adapter = Method(bundle, None), Adapter()
    prompts = (JUDGE / "prompts.txt").read_text().splitlines()
    config = ReportConfig(
        judge=str(JUDGE), prompts=str(JUDGE / "prompts.txt"), clips_per_prompt=2,
        sheet_prompts=tuple(prompts[:2]),
        entries={"two": ReportEntry(role="student"), "again": ReportEntry(role="student")},
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
        "clips.mp4", "contact_sheet.png", "report.json",
    ]  # fmt: skip
    whole = list(adapter.done)
    clips = 2 * len(report.prompts)
    assert clips > CHUNK, "more than one chunk, or this shows nothing"
    assert whole.count("call") > 8

    for position in (0, 1, 2, len(whole) // 2, len(whole) - 1):
        folder = tmp_path / f"stopped-{position}"
        folder.mkdir()
        report, run, adapter = parts_of_a_run(folder)
        poll = run.method.stop.poll
        # Asked for while the work before that position is done.
        run.method.stop.poll = lambda run=run, adapter=adapter, at=position, poll=poll: (
            run.request_stop("preempted") if len(adapter.done) >= at else None, poll(),
        )  # fmt: skip
        report.on_train_end(run)
        assert adapter.done == whole[:position]
        assert list(folder.iterdir()) == []
        assert "report: left out, as the run was stopped (preempted)" in capsys.readouterr().out


def test_a_run_that_was_stopped_before_gets_no_report(tmp_path, capsys):
    report, run, adapter = parts_of_a_run(tmp_path)
    run.request_stop("preempted")
    report.on_train_end(run)
    assert adapter.done == []
    assert "left out, as the run was stopped (preempted)" in capsys.readouterr().out
