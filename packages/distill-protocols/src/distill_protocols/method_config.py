"""What a method's config declares, without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from attrs import frozen

from distill_protocols.planned_run import PlannedRun
from distill_protocols.problems import Problem
from distill_protocols.roles import RoleNeed
from distill_protocols.sampler import SamplerSpec

HealthKind = Literal[
    "student_loss", "matching_loss", "critic_loss", "student_std", "normaliser", "score_distance",
    "discriminator_accuracy",
]  # fmt: skip
"""What a metric of a method means to whoever watches the run's health.

student_loss: of the student, where a rise is a sign of harm. matching_loss: DMD's, which is none.
critic_loss: of the network that follows the student's own clips. student_std: standard deviation of
the clean latents of one of the student's clips in training, on average. normaliser: by which DMD's
gradient is divided. score_distance: between the clean clips that critic and teacher predict.
discriminator_accuracy: share that a discriminator classifies correctly; half is guessing.
"""


@frozen(kw_only=True, slots=False)  # so that a config may have a second base
class MethodConfig(ABC):
    """Base of the config classes of methods: the only description of a method.

    The run file plans and checks by it before torch is imported, and the method itself takes
    roles, update schedule and capabilities from it. A subclass is a frozen attrs class; it states
    ``roles`` and ``turns``, which are abstract, and a default of ``student_sampler`` where its
    student can be sampled.

    Attributes:
        student_sampler: how the student is sampled in validation and export; None: the method
            cannot sample it.
    """

    student_sampler: SamplerSpec | None = None

    @property
    @abstractmethod
    def roles(self) -> tuple[RoleNeed, ...]:
        """Roles that are called, and whether each is trained; any other role of a run is an
        error."""

    @abstractmethod
    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles whose optimizers step in ``iteration`` (1-based): the whole update schedule."""

    def turns_apart(self, iteration: int) -> tuple[tuple[str, ...], ...]:
        """Return the roles of ``turns`` in groups, whose losses are differentiated one after the
        other (``EndingTurns``), so that their activations are never in memory together; by default
        one group."""
        return (self.turns(iteration),)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """Return names of what a step of ``iteration`` measures, as trackers show them:
        ``loss/<term>`` of each loss, and the 0-d outputs by their own names.

        A checkpoint can be kept by these alone. Every loss is named; an output that is left out
        is logged all the same.
        """
        return ("loss/total_loss",)

    @property
    def validation_losses(self) -> tuple[str, ...]:
        """Return names of what ``HeldOutEvaluating.evaluate_held_out`` gives beside the losses of a
        step, so that checkpoints can be kept by ``validation/loss/<name>``."""
        return ()

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """By what it means, the name of a metric of the method (those of ``metrics``, and 0-d
        outputs); what is left out is not watched."""
        return MappingProxyType({})

    @property
    def teacher_guidance(self) -> Mapping[str, tuple[float, float | None]]:
        """By name, the roles whose clips the student is to come near, with the guidance that it
        learns them under (``SamplerSpec.guidance`` and ``guidance_2``); empty: there is no such
        model in the run."""
        return MappingProxyType({})

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do (``Capabilities.missing``)."""
        return ()

    @property
    def needs_negative(self) -> bool:
        """Whether a step, or sampling the student, calls a model with guidance, so that a
        negative condition must exist, unless the models have guidance as an input
        (``Capabilities.embeds_guidance``)."""
        return False

    @property
    def needs_latents(self) -> bool:
        """Whether a step reads ``Batch.latents``; False of a method that makes its own clips from
        noise, which captions alone are enough for."""
        return True

    @property
    def trajectory_times(self) -> tuple[float, ...]:
        """Levels t of a teacher's trajectory that every batch must hold (``Batch.trajectory``, in
        this order); empty: none is read."""
        return ()

    def update_share(self, role: str, low: float, high: float) -> float:
        """Return the share of ``role``'s updates that are made at t in [low, high) (1000 is in the
        last range): how often one of its experts can be expected to step. 1 without a better
        answer: a schedule is then as long as if that expert took all of the role's steps."""
        return 1.0

    def problems(self, run: PlannedRun) -> Iterable[Problem]:
        """Rules between these options and the run's models; paths are keys of
        ``method_config``."""
        return ()
