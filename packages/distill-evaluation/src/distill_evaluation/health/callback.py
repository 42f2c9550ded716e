"""The `health` callback: measures now and then, applies the rules, and says what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import attrs
import torch
from distill_protocols import (
    Callback,
    CapabilityError,
    ConditioningError,
    ContractError,
    HealthKind,
    MethodConfig,
    RankGroup,
    RunParts,
    RunState,
    SamplerSpec,
    StepRecord,
)
from torch import Tensor

from distill_evaluation.health.alarms import Alarm, AlarmFile
from distill_evaluation.health.config import RULES, HealthConfig
from distill_evaluation.health.history import History
from distill_evaluation.health.probe import Probe, Sampled, can_sample
from distill_evaluation.health.rules import Finding, find
from distill_evaluation.health.turns import Turns
from distill_evaluation.health.weights import WeightMovement
from distill_evaluation.health.windows import Window

_log = logging.getLogger(__name__)

PASSES_OF_A_STEP = 3
"""Least model calls that a step makes of a sample: one with gradient counts as three."""
CALLS_TO_DECODE = 8
"""What decoding a clip takes, in model calls; of the tiny model, whose VAE is large beside it."""


class HealthCallback(Callback):
    """Warns when a run goes wrong; see ``HealthConfig`` for what is watched, and ``rules`` for how.

    An alarm is a line of the log and of ``health.jsonl``, and a text for the trackers; the numbers
    are metrics ``health/<name>``, the references ``health/teacher/<name>`` and
    ``health/data/<name>``, and ``health/alarms`` counts the alarms that have not cleared. An alarm
    is given once until it clears.

    History and alarms are state, so that a resumed run raises what an uninterrupted one would. A
    run that had no health before is watched from where it goes on.

    On several ranks the clips are divided by prompts, all ranks know all numbers, and rank 0 alone
    writes and logs.
    """

    name = "health"
    only_observes = True

    def __init__(self, config: HealthConfig, parts: RunParts) -> None:
        self.config = config
        self._parts = parts
        declared = parts.method_config
        self._kinds: Mapping[HealthKind, str] = {} if declared is None else declared.health_metrics
        self._student = _student(config, parts)
        self._teacher = _teacher(config, parts)
        self._probe: Probe | None = None
        self._history = History(steps=0)
        self._window = Window()
        self._movement = WeightMovement()
        self._turns = Turns()
        self._active: dict[str, int] = {}
        self._kept_until: set[int] = set()
        self._asked_for: set[int] = set()
        self._due: int | None = None
        self._begun = False
        self._start: dict[str, dict[str, float]] = {}
        self._ranks: RankGroup | None = None

    def on_train_start(self, run: RunState) -> None:
        self._ranks = run.ranks
        self._history = History(steps=run.max_train_steps)

    def on_step_start(self, run: RunState) -> None:
        # Not in on_train_start: a run that is resumed gets its weights and its state after that.
        if not self._begun:
            self._begin(run)
        interval = self.interval(run.max_train_steps, run.global_batch_size)
        run.measure_losses = self._turns.is_new(run.method, run.iteration, interval)

    def _begin(self, run: RunState) -> None:
        first = not self._history.references and not self._history.series
        run.enter("health, before the first update")
        self._make_probe()
        if first:
            # Kept aside until on_step_end: a stop in this iteration takes it back.
            self._start = self._references(run)
            if run.iteration > 1 and run.ranks.is_first:
                _log.info("health watches this run from iteration %d on", run.iteration)
        self._movement.begin(run.method)
        self._keep_checkpoints(run)
        run.ranks.run_on_first(lambda: AlarmFile(run.output_dir).resume(run.iteration - 1))
        self._begun = True
        if self._due is not None:  # a stop came in the middle of it, and no weight has moved since
            self._check(run, self._due)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self._start:
            self._history.references, self._start = self._start, {}
            for owner in ("teacher", "data"):
                numbers = self._history.references.get(owner, {})
                run.metrics |= {f"health/{owner}/{name}": v for name, v in numbers.items()}
        self._watch(step)
        if step.iteration % self.interval(run.max_train_steps, run.global_batch_size) == 0:
            self._due = run.iteration
            self._check(run, run.iteration)

    def state_dict(self) -> dict[str, object]:
        """Return history, alarms and the means under way; empty before anything was measured. All
        ranks call it together."""
        history = self._history.state_dict()
        if not history or self._ranks is None:
            return {}
        return {
            "history": history,
            "window": self._window.state_dict(self._ranks),
            "weights": self._movement.state_dict(self._ranks),
            "due": self._due,
            "alarms": dict(self._active),
            "kept_until": sorted(self._kept_until),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        assert self._ranks is not None, "on_train_start has not run"
        self._history.load_state_dict(cast(Mapping[str, object], state["history"]))
        self._window.load_state_dict(cast(Mapping[str, object], state["window"]), self._ranks)
        self._movement.load_state_dict(cast(Mapping[str, object], state["weights"]), self._ranks)
        self._due = cast(int | None, state["due"])
        self._active = dict(cast(Mapping[str, int], state["alarms"]))
        self._kept_until = set(cast(Sequence[int], state["kept_until"]))

    def interval(self, steps: int, batch: int) -> int:
        """Return the iterations between two checks of a run.

        Args:
            steps: iterations of the run.
            batch: samples of one.
        """
        if self.config.every_steps is not None:
            return self.config.every_steps
        before, of_a_check = self._calls()
        left = self.config.share * steps * batch * PASSES_OF_A_STEP - before
        affordable = int(left / of_a_check) if of_a_check else self.config.checks
        return max(1, steps // max(1, min(self.config.checks, affordable)))

    # -- measuring ----------------------------------------------------------------------------

    def _make_probe(self) -> None:
        """Read what clips are sampled for; without it, or a sampler, none are."""
        if self._student is None or self._parts.examples is None:
            return
        self._probe = Probe(
            self._parts,
            prompts=self.config.prompts,
            clips_per_prompt=self.config.clips_per_prompt,
            seed=self.config.seed,
            teacher=None if self._teacher is None else self._teacher.role,
            times=self.config.times,
        )

    def _references(self, run: RunState) -> dict[str, dict[str, float]]:
        """Measure teacher and data; {"teacher": {}} where nothing can be sampled."""
        references = {"teacher": self._measure(run, self._teacher)}
        if self._probe is not None:
            data = self._probe.measure_data(run.ranks)
            references |= {"data": data} if data else {}
        return references

    def _measure(self, run: RunState, who: Sampled | None) -> dict[str, float]:
        """Return the numbers of a role's clips; empty where none can be sampled."""
        if self._probe is None or who is None:
            return {}
        try:
            return self._probe.measure(who, run.ranks)
        # Alike on all ranks. What only watches must not end a run that can train without it.
        except (CapabilityError, ConditioningError, ContractError) as error:
            self._probe = None
            if run.ranks.is_first:
                _log.warning("health samples no clips in this run: %s", error)
            return {}

    def _watch(self, step: StepRecord) -> None:
        """Remember what the method declares of this step, and the norms of gradients."""
        for kind, metric in self._kinds.items():
            value = _value_of(step, metric)
            if value is not None:
                self._window.add(kind, value)
        for name, value in step.metrics.items():
            if name.startswith(("grad_norm/", "loss_grad_norm/")):
                self._window.add(name, value)

    def _calls(self) -> tuple[int, int]:
        """Count the model calls that clips take: before the first update, and of a check."""
        if self._student is None or self._parts.examples is None:
            return 0, 0
        clips = self.config.prompts * self.config.clips_per_prompt
        asked = 0 if self._teacher is None else clips * len(self.config.times)
        looked_at = asked + self.config.prompts * CALLS_TO_DECODE
        of_teacher = 0
        if self._teacher is not None:
            of_teacher = clips * self._teacher.sampler.calls_per_clip + looked_at
        return looked_at + of_teacher, clips * self._student.sampler.calls_per_clip + looked_at

    def _check(self, run: RunState, iteration: int) -> None:
        """Measure what is there after ``iteration``, and apply the rules."""
        run.check_finite()
        run.enter("health")
        numbers = self._measure(run, self._student)
        run.metrics |= {f"health/{name}": value for name, value in numbers.items()}
        moved = self._movement.measure(run.method, run.ranks)
        numbers |= {f"moved/{name}": value for name, value in moved.items()}
        run.metrics |= {f"health/moved/{name}": value for name, value in moved.items()}
        means = self._window.take_means(run.ranks)
        numbers |= means
        if "critic_loss" in means and means.get("matching_loss", 0) > 0:
            run.metrics["health/loss_ratio"] = means["critic_loss"] / means["matching_loss"]
        self._history.add(iteration, numbers)
        self._due = None
        self._judge(run, iteration)

    # -- alarms -------------------------------------------------------------------------------

    def _judge(self, run: RunState, iteration: int) -> None:
        """Apply the rules, and act on what they find for the first time."""
        findings: dict[str, Finding] = {}
        for finding in find(self.config, self._history):
            findings.setdefault(finding.alarm, finding)  # a rule begins with its plainest signal
        new = [finding for name, finding in findings.items() if name not in self._active]
        cleared = [name for name in self._active if name not in findings]
        self._active = {name: self._active.get(name, iteration) for name in findings}
        run.metrics["health/alarms"] = float(len(self._active))
        for finding in new:
            self._act(run, finding)
        self._keep_checkpoints(run)
        run.ranks.run_on_first(lambda: self._write(run, iteration, new, cleared))

    def _keep_checkpoints(self, run: RunState) -> None:
        """Ask for the checkpoints of before each alarm, and of before one that may be coming: when
        enough checks agree, it would be too late."""
        run.kept_until -= self._asked_for
        self._asked_for = set(self._kept_until)
        rules = attrs.asdict(self.config, recurse=False).values()
        if any(isinstance(r, RULES) and r.action in ("keep", "stop") for r in rules):
            self._asked_for.update(self._history.iterations[-self.config.patience :][:1])
        for iteration in self._asked_for:
            run.keep_checkpoint(iteration)

    def _act(self, run: RunState, finding: Finding) -> None:
        if finding.action in ("keep", "stop"):
            # The last check before those that agree on it.
            before = self._history.iterations[: -self.config.patience]
            if before:
                self._kept_until.add(before[-1])
        if finding.action == "stop":
            run.request_stop(f"health: {finding.message}")

    def _write(
        self, run: RunState, iteration: int, new: Sequence[Finding], cleared: Sequence[str]
    ) -> None:
        for finding in new:
            alarm = Alarm.of(finding, iteration)
            _log.warning("health, iteration %d, %s: %s", iteration, alarm.rule, alarm.message)
            AlarmFile(run.output_dir).append(alarm)
            for tracker in run.trackers:
                tracker.log_text(iteration, f"health/{alarm.rule}", alarm.message)
        for name in cleared:
            _log.info("health, iteration %d: %s has cleared", iteration, name)


def _value_of(step: StepRecord, metric: str) -> Tensor | float | None:
    kind, _, term = metric.partition("/")
    if kind == "loss":
        return step.losses.get(term)
    value = step.metrics.get(metric)
    return None if isinstance(value, torch.Tensor) and value.ndim else value


def _student(config: HealthConfig, parts: RunParts) -> Sampled | None:
    spec = parts.method.sampler_spec
    if spec is None or config.role not in parts.method.bundle.roles:
        return None
    student = Sampled(role=config.role, sampler=spec)
    return student if can_sample(parts.adapter, student) else None


def _teacher(config: HealthConfig, parts: RunParts) -> Sampled | None:
    """Choose the first teacher that the method declares, and how it samples."""
    declared: MethodConfig | None = parts.method_config
    guidance = {} if declared is None else declared.teacher_guidance
    for role, (high, low) in guidance.items():
        if role in parts.method.bundle.roles:
            spec = config.teacher_sampler or SamplerSpec(
                steps=config.teacher_steps, shift=3.0, guidance=high, guidance_2=low
            )
            teacher = Sampled(role=role, sampler=spec)
            return teacher if can_sample(parts.adapter, teacher) else None
    return None
