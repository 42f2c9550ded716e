"""Exponential moving averages of weights, and the callback that keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from attrs import frozen
from distill_protocols import Callback, CheckpointError, RoleError, RunState, StepRecord
from distill_runtime import is_sharded, local_shard
from torch import Tensor, nn

from distill_trainer.callbacks.configs import EmaConfig

_UPDATES = "ema.updates"


class ExponentialMovingAverage:
    """``e <- d e + (1 - d) p`` after each update of a module (Polyak and Juditsky 1992).

    Parameters are averaged in fp32 whatever the module holds; persistent buffers are copied, as
    an average of counters or running statistics means nothing. Of a sharded module each process
    averages its shard.

    Args:
        module: its weights are the first average.
        decay: d in [0, 1); 0 always copies.
        start_update: up to and including this update the average only copies, so that it does
            not remember the first, bad weights.
        names: average only these parameters (``RoleHandle.trained``); None: all of them.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        start_update: int = 0,
        names: Collection[str] | None = None,
    ) -> None:
        self.decay = decay
        self.start_update = start_update
        self._updates = 0
        self._average: dict[str, Tensor] = {}
        self._copied: dict[str, Tensor] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if names is not None and name not in names:
                    continue  # it is not trained, so its average is itself
                self._average[name] = value.detach().to(torch.float32, copy=True)
            else:
                self._copied[name] = value.detach().clone()
        self._source = _Parameters.find(module, self._average)

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return self._updates

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's weights; call it after each optimizer step."""
        # Walking the module costs more than the average itself, so its parameters are found
        # once; they stay the same objects, or the optimizer would have lost them too.
        if self._source.module is not module:
            self._source = _Parameters.find(module, self._average)
        weights, averages = self._source.values, list(self._average.values())
        if self._source.any_sharded:
            weights = [local_shard(weight) for weight in weights]
            averages = [local_shard(average) for average in averages]
        self._updates += 1
        if self._updates <= self.start_update:
            torch._foreach_copy_(averages, weights)
        else:
            if not self._source.all_fp32:
                weights = [weight.float() for weight in weights]  # lerp takes one type only
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        if self._copied:
            state = module.state_dict()
            for name, buffer in self._copied.items():
                buffer.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Put the average into ``module`` for the block; afterwards it has its own weights again,
        bit for bit."""
        averages = [local_shard(value) for value in self.weights().values()]
        live = self._live_memory(module)
        saved = [value.clone() for value in live]
        try:
            _copy_all(live, averages)
            yield
        finally:
            _copy_all(self._live_memory(module), saved)

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights under the module's own names; the tensors themselves."""
        return {**self._average, **self._copied}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the module's own names, and the count ``ema.updates``."""
        return {**self.weights(), _UPDATES: torch.tensor(self._updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            CheckpointError: names or shapes are not those of this module.
        """
        own = self.weights()
        wrong = set(state) ^ {*own, _UPDATES}
        wrong |= {name for name in own.keys() & state if own[name].shape != state[name].shape}
        if wrong:
            raise CheckpointError(
                f"the saved average does not fit the module at {', '.join(sorted(wrong)[:5])}"
                f"{' ...' if len(wrong) > 5 else ''} ({len(wrong)} names); an average belongs to "
                "one architecture. Resume with the models that the checkpoint was made with."
            )
        for name, value in own.items():
            value.copy_(state[name])
        self._updates = int(state[_UPDATES])

    def _live_memory(self, module: nn.Module) -> list[Tensor]:
        """Return the module's own memory of what is averaged or copied, in ``weights``' order."""
        # Looked up each time: after a call of a sharded module its parameters may be the gathered
        # ones (state_dict reshards them, or the next call would take those), and the first call may
        # have exchanged the shards' memory.
        state = module.state_dict()
        return [local_shard(state[name]) for name in self.weights()]


@frozen(eq=False)
class _Parameters:
    """The parameters of a module that are averaged, and what holds of all of them."""

    module: nn.Module
    values: list[Tensor]
    any_sharded: bool
    all_fp32: bool

    @classmethod
    def find(cls, module: nn.Module, names: Iterable[str]) -> _Parameters:
        state = module.state_dict(keep_vars=True)
        values = [state[name] for name in names]
        return cls(
            module,
            values,
            any_sharded=any(map(is_sharded, values)),
            all_fp32=all(value.dtype == torch.float32 for value in values),
        )


@torch.no_grad()
def _copy_all(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


class EmaCallback(Callback):
    """Keeps an average of every module of the named roles, in ``RoleHandle.ema``.

    An average moves exactly when that module's own optimizer has stepped: not in iterations that
    are another role's turn, and not where fp16 scaling left the step out; or, where the config says
    so, in every iteration. Its state is saved with the role, not here.
    """

    name = "ema"

    def __init__(self, config: EmaConfig) -> None:
        self.config = config

    def on_train_start(self, run: RunState) -> None:
        run.method.bundle.require_roles(self.config.roles)
        for name in self.config.roles:
            role = run.method.bundle[name]
            if not role.trainable:
                raise RoleError(
                    f"EmaConfig.roles names {name!r}, which is frozen; its weights never move, so "
                    "there is nothing to average. Leave it out."
                )
            for key, module in role.modules.items():
                role.ema[key] = ExponentialMovingAverage(
                    module,
                    self.config.decay_per_move,
                    start_update=self.config.start_update,
                    names=None if role.trained is None else role.trained[key],
                )

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        every_iteration = self.config.per == "iteration"
        if not step.stepped and not every_iteration:
            return
        averages = run.method.bundle.by_module("ema")
        modules = run.method.model_dict
        for key in averages if every_iteration else step.stepped:
            if key in averages:
                averages[key].update(modules[key])
