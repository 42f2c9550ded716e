"""The sections ``training`` and ``validation`` of a run file. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import optional
from distill_protocols import GivenFrames, SamplerSpec
from distill_protocols.validators import above, at_least, file_name_problem, within


def _not_blank(instance: Any, attribute: Attribute[str], value: str) -> None:
    if not value.strip():
        raise ValueError(f"{value!r} must not be empty: {attribute.name} has to name something")


@frozen(kw_only=True)
class ScheduleConfig:
    """How the learning rate changes, counted in the optimizer's own steps.

    Attributes:
        name: ``constant``, or ``cosine`` or ``linear`` down to ``final_ratio``.
        warmup_steps: steps below the full rate at the start; step n has n / (warmup_steps + 1).
        final_ratio: share of the full rate at the end of ``cosine`` and ``linear``.
    """

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = field(
        default=0, validator=at_least(0, "it counts optimizer steps; 0 is no warm-up")
    )
    final_ratio: float = field(
        default=0.0,
        validator=at_least(0, "a rate below 0 would climb the loss; 0 falls to nothing"),
    )

    @final_ratio.validator
    def _check_final(self, attribute: object, value: float) -> None:
        if value > 0 and self.name == "constant":
            raise ValueError(
                f"{value:g} is used by no schedule: a constant rate has no end to fall to. Choose "
                "name: cosine or linear, or leave final_ratio out"
            )


@frozen(kw_only=True)
class OptimizerConfig:
    """The optimizers of trainable modules: one for each, all alike.

    Attributes:
        name: ``adamw``, or ``sgd`` (plain: no momentum; ``betas`` and ``eps`` are AdamW's).
        lr: full learning rate.
        betas: decay of AdamW's first and second moment. 0 for the first is customary in DMD2.
        eps: AdamW's.
        weight_decay: decoupled for AdamW, L2 for SGD.
        fused: one kernel for all parameters; left out, it is used wherever it works (not under
            fp16, whose loss scaling has to know whether a step was left out).
        schedule: learning-rate schedule.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = field(
        default=1e-5,
        validator=above(
            0,
            "at 0 no weight moves, and below 0 the loss is climbed. A role that shall not move is "
            "frozen instead",
        ),
    )
    betas: tuple[float, float] = field(default=(0.9, 0.999))
    eps: float = field(
        default=1e-8,
        validator=above(0, "AdamW divides by sqrt(v) + eps and v can be 0; 1e-8 is customary"),
    )
    weight_decay: float = field(
        default=0.01, validator=at_least(0, "below 0 weights would grow without end; 0 is none")
    )
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
class DistributedConfig:
    """How a run is distributed over the processes that ``torchrun`` started.

    Attributes:
        strategy: none: one process. ddp: each process has all of a trained role (and of a frozen
            one, unless the role's ``FsdpPolicy`` shards it). fsdp2: each has a shard of every role
            (unless its policy states otherwise). hsdp: shards within a group of ``shard_size``
            processes, copies across groups. Left out: ddp for several processes, else none.
        shard_size: processes of one group of hsdp; left out, those of one machine.
        sync_every_micro_step: fsdp2 and hsdp: sum gradients over processes in every micro step
            instead of the last one only: more traffic, but no full gradient waits in between.
        timeout_seconds: time after which a process that does not come to where the others wait is
            given up, and the run ends with an error that names it.
    """

    strategy: Literal["none", "ddp", "fsdp2", "hsdp"] | None = None
    shard_size: int | None = field(
        default=None,
        validator=optional(at_least(1, "a group needs a process. Leave it out for one a machine")),
    )
    sync_every_micro_step: bool = False
    timeout_seconds: float = field(
        default=600.0, validator=above(0, "nobody answers in no time; 600 is customary")
    )

    @shard_size.validator
    def _check_hsdp(self, attribute: object, value: int | None) -> None:
        if value is not None and self.strategy != "hsdp":
            raise ValueError(
                f"{value} with strategy {self.strategy}; only hsdp has groups, and the others "
                "would pass over it. Use strategy: hsdp, or leave it out"
            )


@frozen(kw_only=True)
class TrainingConfig:
    """How long a run trains, how much at once, and what it writes.

    Attributes:
        output_dir: folder of everything that the run writes.
        max_train_steps: iterations; each processes all micro batches of a global batch.
        seed: of every random draw of the run.
        global_batch_size: samples per iteration, over all devices and micro steps.
        batch_size_per_device: samples per forward call; left out, the whole global batch at once.
            Gradients are accumulated over the rest.
        optimizer: for every trainable role that has no options of its own.
        log_every: iterations between two log points.
        trackers: names of the trackers that numbers and clips go to.
        progress: a progress bar (plain lines where the output is no terminal).
        distributed: how the run is spread over processes.
        attention_backend: kernel of the attention layers of every role that names none of its own
            (``models.<role>.attention_backend``); ``flash3`` and ``flash4`` are versions of the
            flash kernel that torch's own choice then takes, for all roles. Left out: torch's own
            choice.
        cpu_threads: threads of one CPU operation, set by the app; left out, torch's own choice.
            1 is best for tiny models: more wait for each other, badly so on a busy machine.
    """

    output_dir: str = field(validator=_not_blank, metadata={"path": ()})
    max_train_steps: int = field(
        validator=within(1, 10_000_000, "each is one step of the run; schedules are laid over them")
    )
    seed: int = field(default=0, validator=at_least(0, "seeds count from 0; take any other"))
    global_batch_size: int = field(
        default=1, validator=at_least(1, "an iteration needs at least one sample")
    )
    batch_size_per_device: int | None = field(
        default=None,
        validator=optional(
            at_least(1, "a forward call needs a sample. Leave it out to take all at once")
        ),
    )
    optimizer: OptimizerConfig = field(factory=OptimizerConfig)
    log_every: int = field(
        default=10, validator=at_least(1, "it is an interval; log rarely with a large one")
    )
    trackers: tuple[str, ...] = field(default=("tensorboard", "jsonl"))
    progress: bool = True
    distributed: DistributedConfig = field(factory=DistributedConfig)
    attention_backend: str | None = None
    cpu_threads: int | None = field(
        default=None,
        validator=optional(at_least(1, "work needs a thread. Leave it out for torch's own choice")),
    )

    def micro_batch(self, world_size: int = 1) -> int:
        """Return the samples that one device takes in one micro step."""
        return self.global_batch_size // (self.accumulation(world_size) * world_size)

    def accumulation(self, world_size: int = 1) -> int:
        """Return the micro steps of an iteration: global / (per device * ``world_size``).

        Raises:
            ValueError: it does not divide; the message holds the arithmetic.
        """
        total = self.global_batch_size
        if self.batch_size_per_device is None:
            if total % world_size:
                less = total - total % world_size
                raise ValueError(
                    f"global_batch_size {total} over {world_size} devices is "
                    f"{total / world_size:.3g} samples each; it must divide, because every device "
                    f"takes an equal share. Use {f'{less} or ' if less else ''}{less + world_size}"
                )
            return 1
        at_once = self.batch_size_per_device * world_size
        if total % at_once:
            less = total - total % at_once
            raise ValueError(
                f"{total} samples (global_batch_size) / ({self.batch_size_per_device} a device * "
                f"{world_size} device(s) = {at_once}) = {total / at_once:.3g} micro steps; it "
                "must divide, because every micro step is a full one. Use a global_batch_size of "
                f"{f'{less} or ' if less else ''}{less + at_once}"
            )
        return total // at_once


_TAKEN_NAMES = {
    "x0": "where predictions are saved",
    "validation.json": "the record of a validation",
    "sheet.png": "the picture of all views",
}
"""What a validation's folder holds beside those of views, in small letters: some file systems tell
none from capitals."""


@frozen(kw_only=True)
class ViewConfig:
    """One set of clips in a validation.

    Attributes:
        role: which role samples.
        sampler: how it samples; left out, as the method samples its student.
        ema: use averaged weights instead of live ones.
        latent_frames: length of the videos, in latent frames, for causal roles: they make a video
            chunk by chunk, of any length, and show here whether it holds together beyond the
            length that they are trained on. Left out, the clips have the run's length.
    """

    role: str = field(validator=_not_blank)
    sampler: SamplerSpec | None = None
    ema: bool = False
    latent_frames: int | None = field(
        default=None,
        validator=optional(
            within(
                1,
                1000,
                "all frames of a validation are in memory at once. Leave it out for the run's "
                "length; apps/sample streams longer videos",
            )
        ),
    )


@frozen(kw_only=True)
class PredictionsConfig:
    """What several roles predict of one noised clip, beside each other.

    Attributes:
        roles: their columns, in this order, after that of the clip itself. All are called with
            their live weights and without guidance.
        t: noise levels, a row each.
        view: the view whose clips are noised: its clips are of the prompts that people look at, so
            no data are needed, and a view that does not change lets the roles alone make the
            difference between two validations. Left out, the first view of a role that is not
            trained, or else the first. The clips of a student's view are what distribution
            matching compares its teacher and critic on.
    """

    roles: tuple[str, ...] = field()
    t: tuple[float, ...] = field(default=(250.0, 500.0, 750.0, 1000.0))
    view: str | None = None

    @roles.validator
    def _check_roles(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value or len(set(value)) < len(value):
            raise ValueError(
                f"{list(value)} must name at least one role, and none twice: each is a column"
            )

    @t.validator
    def _check_t(self, attribute: object, value: tuple[float, ...]) -> None:
        if not value or not all(0 < t <= 1000 for t in value):
            raise ValueError(
                f"{list(value)} must be times in (0, 1000]: at 0 nothing is to be predicted, and "
                "1000 is pure noise"
            )
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)} must name no time twice: each is a row")


@frozen(kw_only=True)
class HeldOutDataConfig:
    """Data that are never trained on, to measure losses on.

    Attributes:
        path: folder of a latent data set, as ``preprocess`` writes it, of the run's shapes.
    """

    path: str = field(validator=_not_blank, metadata={"path": ()})


@frozen(kw_only=True)
class ValidationConfig:
    """What is looked at and measured while training: clips of the same prompts from the same noise
    each time, and the method's own losses on data that are not trained on.

    Each validation writes ``validation/iteration-<n>/`` in the output folder: a clip a prompt and
    view, ``sheet.png`` with all views below each other, and ``validation.json``, which names all
    of them; ``validation/over_time/<view>.png`` shows a view in all validations up to now. A view
    of a role that is not trained is sampled once, kept in ``validation/kept/``, and never again
    unless role, sampler, prompts or seed change.

    With ``data`` or ``share`` the losses of the method's own steps are measured on held-out data:
    without gradient, in eval mode, of the same samples at the same times, noises and exit steps
    each time, so that only the weights make a difference. ``validation/loss/<term>`` is a loss on
    these samples, ``validation/drift/<term>`` that less the loss on as many samples of the training
    data, at the same weights with the same noises: it grows where the run learns its data by
    heart. Every role's losses are measured, whoever's turn it is. ``total_loss`` is among them
    where all iterations have the same turns; elsewhere it is a sum of other terms each time.
    Checkpoints can be kept by these numbers (``checkpoint.keep_best``).

    Attributes:
        every_steps: iterations between two validations; 0 validates only at start and end.
        at_start: validate before the first iteration of a fresh run.
        at_end: validate after the last one (not after a stop that was asked for).
        prompts: one clip each; none where only losses are measured.
        images: PNG or JPEG files, the first frame of each prompt's clip, of the size of the run's
            clips: for image-to-video models, and others that take one.
        last_images: beside them, the last frame of each prompt's clip.
        videos: instead of images, a video for each prompt whose clip goes on from its last frames,
            of the size of the run's clips: for models that read several first frames.
        video_frames: so many of a video's last frames are the clip's first ones.
        seed: of the noise (clip n begins as a stock pipeline's after ``torch.manual_seed(seed +
            n)``, as in apps/sample), and of the held-out samples' order; the run's own generators
            are not touched.
        fps: frames per second of the clips that are written.
        views: what is sampled, by the name it is logged under; none where only losses are
            measured.
        x0: what several roles predict of the same noised clips, a video a prompt in
            ``validation/iteration-<n>/x0/``; left out, there are none.
        data: held-out data of their own.
        share: instead of ``data``, the share of the run's data set that is held out and never
            trained on; which samples is the same for every seed. Where several samples were cut
            from one video they may be on either side: then take ``data``.
        batches: so many micro batches, of all processes together, are measured on held-out data,
            and as many on training data.
    """

    every_steps: int = field(
        default=0, validator=at_least(0, "it is an interval; 0 validates only at start and end")
    )
    at_start: bool = False
    at_end: bool = True
    prompts: tuple[str, ...] = field(default=())
    images: tuple[str, ...] = field(default=(), metadata={"path": ()})
    last_images: tuple[str, ...] = field(default=(), metadata={"path": ()})
    videos: tuple[str, ...] = field(default=(), metadata={"path": ()})
    video_frames: int = field(default=1, validator=at_least(1, "a clip goes on from a frame"))
    seed: int = field(default=0, validator=at_least(0, "seeds count from 0; take any other"))
    fps: float = field(
        default=8.0, validator=within(0.1, 240, "players show no other speeds; 8 is customary")
    )
    views: dict[str, ViewConfig] = field(factory=dict)
    x0: PredictionsConfig | None = field(default=None)
    data: HeldOutDataConfig | None = None
    share: float | None = field(default=None)
    batches: int = field(
        default=4,
        validator=within(
            1, 10_000, "each is a step of the method in every validation; 4 balance time and noise"
        ),
    )

    @property
    def measures_losses(self) -> bool:
        """Whether there are held-out data."""
        return self.data is not None or self.share is not None

    @prompts.validator
    def _check_prompts(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value and (self.views or not self.measures_losses):
            raise ValueError(
                "[] must hold at least one prompt: each is one clip. Leave the validation section "
                "out if there is nothing to sample, or name data or a share to measure losses alone"
            )

    @share.validator
    def _check_share(self, attribute: object, value: float | None) -> None:
        if value is None:
            return
        if self.data is not None:
            raise ValueError(
                f"{value:g} beside data; losses are measured on one of the two. Leave one of them "
                "out"
            )
        if not 0 < value <= 0.5:
            raise ValueError(
                f"{value:g} must be above 0 and at most 0.5: what is held out is not trained on. "
                "0.05 is customary"
            )

    @property
    def given(self) -> GivenFrames:
        """The frames that are given of each prompt's clip."""
        first = self.video_frames if self.videos else int(bool(self.images))
        return GivenFrames(first=first, last=bool(self.last_images))

    @images.validator
    @last_images.validator
    @videos.validator
    def _check_files(self, attribute: Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
        if value and len(value) != len(self.prompts):
            raise ValueError(
                f"{len(value)} {attribute.name} for {len(self.prompts)} prompts; there must be one "
                "for each prompt, or none at all"
            )
        missing = [path for path in value if not Path(path).is_file()]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: no such file, and a validation would fail in the middle of "
                "the run. Name files of the size of the run's clips"
            )
        if value and attribute.name == "videos" and self.images:
            raise ValueError("videos beside images; a clip begins with one of the two")

    @views.validator
    def _check_views(self, attribute: object, value: dict[str, ViewConfig]) -> None:
        if not value and self.prompts:
            raise ValueError(
                "{} must hold at least one view: nothing would be sampled. Name a role, such as "
                "views: {student: {role: student}}"
            )
        for problem in filter(None, map(file_name_problem, value)):
            raise ValueError(f"{problem}; clips are saved under the names of views")
        for name in value:
            if (use := _TAKEN_NAMES.get(name.lower())) is not None:
                raise ValueError(f"{name!r} is {use}; give the view another name")

    @x0.validator
    def _check_x0(self, attribute: object, value: PredictionsConfig | None) -> None:
        if value is None:
            return
        if not self.views:
            raise ValueError("it shows predictions of a view's clips, and there is no view")
        if value.view is not None and value.view not in self.views:
            raise ValueError(
                f"there is no view {value.view!r} whose clips could be noised (views: "
                f"{', '.join(self.views)}). Name one of them"
            )
        if all(view.latent_frames for view in self.views.values()) or (
            value.view is not None and self.views[value.view].latent_frames
        ):
            raise ValueError(
                "its view makes videos of another length than the run's clips, which only causal "
                "roles could predict. Name a view without latent_frames"
            )
