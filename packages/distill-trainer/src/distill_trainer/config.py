"""The sections ``training`` and ``validation`` of a run file. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import ge, gt, optional
from distill_protocols.sampler import SamplerSpec

TrackerName = Literal["tensorboard", "jsonl", "wandb"]


def _not_blank(instance: Any, attribute: Attribute[str], value: str) -> None:
    if not value.strip():
        raise ValueError(f"{value!r} must not be empty: {attribute.name} has to name something")


@frozen(kw_only=True)
class ScheduleConfig:
    """How the learning rate moves, counted in the optimizer's own steps.

    Attributes:
        name: ``constant``, or ``cosine`` or ``linear`` down to ``final_ratio``.
        warmup_steps: steps below the full rate at the start; step n has n / (warmup_steps + 1).
        final_ratio: share of the full rate at the end of ``cosine`` and ``linear``.
    """

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = field(default=0, validator=ge(0))
    final_ratio: float = field(default=0.0, validator=ge(0))

    @final_ratio.validator
    def _check_final(self, attribute: object, value: float) -> None:
        if value > 0 and self.name == "constant":
            raise ValueError(
                f"{value:g} is used by no schedule: a constant rate has no end to fall to. Choose "
                "name: cosine or linear, or leave final_ratio out"
            )


@frozen(kw_only=True)
class OptimizerConfig:
    """One optimizer a trainable module, all alike.

    Attributes:
        name: ``adamw``, or ``sgd`` (plain: no momentum; ``betas`` and ``eps`` are AdamW's).
        lr: full learning rate.
        betas: decay of AdamW's first and second moment. 0 for the first is customary in DMD2.
        eps: AdamW's.
        weight_decay: decoupled for AdamW, L2 for SGD.
        fused: one kernel for all parameters; left out, wherever it works (not under fp16, whose
            loss scaling has to know whether a step was left out).
        schedule: learning-rate schedule.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = field(default=1e-5, validator=gt(0))
    betas: tuple[float, float] = field(default=(0.9, 0.999))
    eps: float = field(default=1e-8, validator=gt(0))
    weight_decay: float = field(default=0.01, validator=ge(0))
    fused: bool | None = None
    schedule: ScheduleConfig = field(factory=ScheduleConfig)

    @betas.validator
    def _check_betas(self, attribute: object, value: tuple[float, float]) -> None:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(
                f"{list(value)} must both lie in [0, 1): they are shares of a running mean, and "
                "at 1 it would never move"
            )


@frozen(kw_only=True)
class TrainingConfig:
    """How long, how much at once, and what is written.

    Attributes:
        output_dir: folder of everything that the run writes.
        max_train_steps: iterations; in one, all micro batches of a global batch go through.
        seed: of every random draw of the run.
        global_batch_size: samples an iteration, over all devices and micro steps.
        batch_size_per_device: samples a forward call; left out, the global batch goes at once.
            Gradients are accumulated over the rest.
        optimizer: for every trainable role; keys of ``models.<role>.optimizer`` replace its own.
        log_every: iterations between two log points.
        trackers: where numbers and clips go.
        progress: a progress bar (plain lines where the output is no terminal).
        cpu_threads: threads of one CPU operation, set by the app; left out, torch's own choice.
            1 is best for tiny models: more wait for each other, badly so on a busy machine.
    """

    output_dir: str = field(validator=_not_blank, metadata={"path": ()})
    max_train_steps: int = field(validator=ge(1))
    seed: int = field(default=0, validator=ge(0))
    global_batch_size: int = field(default=1, validator=ge(1))
    batch_size_per_device: int | None = field(default=None, validator=optional(ge(1)))
    optimizer: OptimizerConfig = field(factory=OptimizerConfig)
    log_every: int = field(default=10, validator=ge(1))
    trackers: tuple[TrackerName, ...] = field(default=("tensorboard", "jsonl"))
    progress: bool = True
    cpu_threads: int | None = field(default=None, validator=optional(ge(1)))

    @batch_size_per_device.validator
    def _check_divides(self, attribute: object, value: int | None) -> None:
        if value is not None and value >= 1:
            self.accumulation()

    @trackers.validator
    def _check_trackers(self, attribute: object, value: tuple[str, ...]) -> None:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice: one run logs to it once")

    def accumulation(self, world_size: int = 1) -> int:
        """Micro steps an iteration: global / (per device * ``world_size``).

        Raises:
            ValueError: it does not divide; the message holds the arithmetic.
        """
        total = self.global_batch_size
        if self.batch_size_per_device is None:
            if total % world_size:
                raise ValueError(
                    f"global_batch_size {total} over {world_size} devices is "
                    f"{total / world_size:.3g} samples each; it must divide, because every device "
                    f"takes an equal share. Use {total - total % world_size or world_size}."
                )
            return 1
        at_once = self.batch_size_per_device * world_size
        if total % at_once:
            raise ValueError(
                f"{total} samples (global_batch_size) / ({self.batch_size_per_device} a device * "
                f"{world_size} device(s) = {at_once}) = {total / at_once:.3g} micro steps; it "
                "must divide, because every micro step is a full one. Use a global_batch_size of "
                f"{max(total - total % at_once, at_once)} or {total + at_once - total % at_once}"
            )
        return total // at_once


@frozen(kw_only=True)
class ViewConfig:
    """One thing to look at in validation.

    Attributes:
        role: which role samples.
        sampler: how; left out, the method's own way for its student.
        ema: with averaged weights instead of live ones.
    """

    role: str = field(validator=_not_blank)
    sampler: SamplerSpec | None = None
    ema: bool = False


@frozen(kw_only=True)
class ValidationConfig:
    """Clips to look at while training: the same prompts and the same noise each time.

    Attributes:
        every_steps: iterations between two looks; 0 looks only at start and end.
        at_start: look before the first iteration of a fresh run.
        at_end: look after the last one (not after a stop that was asked for).
        prompts: one clip each.
        seed: of the noise; the run's own generators are not touched.
        fps: frames a second of the clips that are written.
        views: what to look at, by the name it is logged under.
    """

    every_steps: int = field(default=0, validator=ge(0))
    at_start: bool = False
    at_end: bool = True
    prompts: tuple[str, ...] = field()
    seed: int = field(default=0, validator=ge(0))
    fps: float = field(default=8.0, validator=gt(0))
    views: dict[str, ViewConfig] = field()

    @prompts.validator
    def _check_prompts(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value:
            raise ValueError(
                "[] must hold at least one prompt: each is one clip. Leave the validation section "
                "out if there is nothing to look at"
            )

    @views.validator
    def _check_views(self, attribute: object, value: dict[str, ViewConfig]) -> None:
        if not value:
            raise ValueError(
                "{} must hold at least one view: nothing would be sampled. Name a role, such as "
                "views: {student: {role: student}}"
            )
        bad = [name for name in value if not name or set(name) & set("/\\") or name[0] == "."]
        if bad:
            raise ValueError(f"{bad[0]!r} must be usable as a file name: clips are saved under it")
