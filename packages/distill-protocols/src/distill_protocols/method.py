"""An algorithm as the trainer, callbacks and checkpoints see it.

``distill_runtime.DistillMethod`` implements all of it but a method's own step and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_protocols.batch import Condition
from distill_protocols.bundle import ModelBundle
from distill_protocols.latents import Latents, LatentsT
from distill_protocols.random import RandomStreams
from distill_protocols.sampler import SamplerSpec, SampleView
from distill_protocols.stop import StopFlag


class StepResult(NamedTuple):
    """What one micro step gives back.

    Attributes:
        loss_map: scalar tensors; ``total_loss`` is the one that is differentiated.
        outputs: detached tensors for logs and debug dumps; a 0-d tensor is logged as a metric.
    """

    loss_map: dict[str, Tensor]
    outputs: dict[str, Tensor]


EndTurn: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes the losses of a turn that is over, ``total_loss`` among them, and returns them for the
``loss_map`` of the step."""


def keep_graph(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the losses as they are: the step's total loss is differentiated with their graph."""
    return losses


class TrainableMethod(Protocol):
    """Losses of a step, and which optimizers an iteration steps. Iterations count from 1.

    Keys of dictionaries are ``role.module``.
    """

    bundle: ModelBundle
    streams: RandomStreams
    stop: StopFlag

    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        """Losses of one micro step; ``loss_map["total_loss"]`` is differentiated."""
        ...

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        """Return the optimizers that this iteration steps: the whole update schedule."""
        ...

    def get_lr_schedulers(self, iteration: int) -> dict[str, LRScheduler]:
        """Return the schedulers of exactly the optimizers that this iteration steps."""
        ...

    def unscale_gradients(self, iteration: int) -> None:
        """Undo loss scaling of the gradients before anything reads them."""
        ...

    def optimizers_schedulers_step(self, iteration: int) -> tuple[str, ...]:
        """Step this iteration's optimizers, and a scheduler only where its optimizer stepped.

        Returns:
            Keys of the optimizers that stepped.
        """
        ...

    def optimizers_zero_grad(self, iteration: int) -> None:
        """Drop the gradients of every optimizer."""
        ...

    def batch_ids(self, batch: Any) -> Sequence[str]:
        """Ids of the samples in ``batch``, for error messages."""
        ...

    @property
    def sampler_spec(self) -> SamplerSpec | None:
        """How the student is sampled; None: unknown."""
        ...

    def sample_for_logging(
        self,
        views: Sequence[SampleView],
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Clips [B, 3, F, H, W] in [0, 1] by view name, all views from the same noise.

        Args:
            seed: of the noise. A row's noise is a function of it and of the row's place alone, so
                that a rank which samples a part gives exactly those clips of the whole.
            rows: the places of the rows of ``cond`` among all; None: 0 .. B - 1.

        Raises:
            CapabilityError: this method cannot sample.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a whole step."""
        ...

    @property
    def model_dict(self) -> dict[str, nn.Module]: ...
    @property
    def optimizer_dict(self) -> dict[str, Optimizer]: ...
    @property
    def scheduler_dict(self) -> dict[str, LRScheduler]: ...
    @property
    def grad_scaler(self) -> torch.amp.GradScaler:
        """Enabled where a trainable role computes in fp16; otherwise it passes through."""
        ...

    @property
    def update_counts(self) -> dict[str, int]:
        """Optimizer steps really taken so far."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What the method itself moves (JSON-able)."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what ``state_dict`` gave."""
        ...

    def rank_state(self) -> Mapping[str, object]:
        """Return what the method moves on this process alone: nested mappings, lists, numbers and
        tensors, which are never written to again; empty: nothing. Taken before every iteration."""
        ...

    def load_rank_state(self, state: Mapping[str, object]) -> None:
        """Restore what ``rank_state`` gave; of an empty state begin anew."""
        ...


@runtime_checkable
class EndingTurns(Protocol):
    """A method whose step has several turns, whose graphs have nothing in common.

    A step calls ``end_turn`` after each of them but the last one, and adds what it returns to its
    ``loss_map``. While a trainer takes a step it differentiates there, and the losses have no graph
    any more: the activations of one turn are gone before those of the next are made.
    """

    end_turn: EndTurn
    """``keep_graph``, but while a trainer takes a step."""


@runtime_checkable
class LatentViews(Protocol):
    """A method that can also show what roles predict of a noised clip, and not only what they make
    of noise. All without gradient, in eval mode, and with none of the run's generators."""

    def sample_latents(
        self, view: SampleView, cond: Condition, *, seed: int, rows: Sequence[int]
    ) -> Latents:
        """Normalised latents [B, C, T, H, W] of the clips that ``sample_for_logging`` gives."""
        ...

    def decode_latents(self, latents: Latents) -> Tensor:
        """Clips [B, 3, F, H_px, W_px] in [0, 1] of normalised latents [B, C, T, H, W]."""
        ...

    def predict_latents(
        self,
        role: str,
        latents: LatentsT,
        t: float,
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int],
    ) -> LatentsT:
        """x0 [B, C, T, H, W] that ``role``, with its live weights and without guidance, predicts of
        ``latents`` noised to ``t``.

        Args:
            seed, rows: of the noise, which is the same for every role and t.
        """
        ...


@runtime_checkable
class HeldOutEvaluating(Protocol):
    """A method with evaluations of its own on held-out data, beside the losses of its steps.

    ``MethodConfig.validation_losses`` names what they give.
    """

    def evaluate_held_out(self, batch: Any, iteration: int) -> Mapping[str, Tensor]:
        """0-d tensors by name, of one held-out micro batch; logged as ``validation/loss/<name>``.

        Called like ``single_train_step``, on all ranks alike, without gradient, in eval mode, and
        with random streams that are the same in each validation and none of the run's.
        """
        ...
