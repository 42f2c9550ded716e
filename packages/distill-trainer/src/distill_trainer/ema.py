"""Exponential moving average of one module's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from distill_protocols import CheckpointError
from torch import Tensor, nn

from distill_trainer.shards import local

_UPDATES = "ema.updates"


class ExponentialMovingAverage:
    """``e <- d e + (1 - d) p`` after each update of a module (Polyak and Juditsky 1992).

    Parameters are averaged in fp32 whatever the module holds; persistent buffers are copied, as
    an average of counters or running statistics means nothing. Of a sharded module each process
    averages its part.

    Args:
        module: starts the average off with its weights.
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
                    continue  # it never moves, so its average is itself
                self._average[name] = value.detach().to(torch.float32, copy=True)
            else:
                self._copied[name] = value.detach().clone()
        self._source: tuple[nn.Module, list[Tensor]] = (module, self._weights(module))

    @property
    def updates(self) -> int:
        """Updates seen so far."""
        return self._updates

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights. Call it after each step of its optimizer."""
        # Walking the module costs more than the average itself, so its parameters are looked up
        # once; they stay the same objects, or the optimizer would have lost them too.
        if self._source[0] is not module:
            self._source = (module, self._weights(module))
        weights = [local(weight) for weight in self._source[1]]
        averages = [local(average) for average in self._average.values()]
        self._updates += 1
        if self._updates <= self.start_update:
            torch._foreach_copy_(averages, weights)
        else:
            if any(weight.dtype != torch.float32 for weight in weights):
                weights = [weight.float() for weight in weights]  # lerp takes one type only
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        if self._copied:
            state = module.state_dict()
            for name, buffer in self._copied.items():
                buffer.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within: ``module`` holds the average; after: its own weights again, bit for bit."""
        mine = [local(value) for value in self.weights().values()]
        live = self._live(module)
        kept = [value.clone() for value in live]
        try:
            _copy(live, mine)
            yield
        finally:
            _copy(self._live(module), kept)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own names; the tensors themselves."""
        return {**self._average, **self._copied}

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own names, and the count ``ema.updates``."""
        return {**self.weights(), _UPDATES: torch.tensor(self._updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            CheckpointError: names or shapes are not those of this module.
        """
        mine = self.weights()
        wrong = set(state) ^ {*mine, _UPDATES}
        wrong |= {name for name in mine.keys() & state if mine[name].shape != state[name].shape}
        if wrong:
            raise CheckpointError(
                f"the saved average does not fit the module at {', '.join(sorted(wrong)[:5])}"
                f"{' ...' if len(wrong) > 5 else ''} ({len(wrong)} names); an average belongs to "
                "one architecture. Resume with the models that the checkpoint was made with."
            )
        for name, value in mine.items():
            value.copy_(state[name])
        self._updates = int(state[_UPDATES])

    def _live(self, module: nn.Module) -> list[Tensor]:
        """The memory of what is averaged or copied, in the order of ``weights``."""
        # Looked up each time: of a sharded module, a call may have left whole weights in the place
        # of the parts (state_dict puts them away, or the next call would take those), and the
        # first one may have exchanged the parts' memory.
        state = module.state_dict()
        return [local(state[name]) for name in self.weights()]

    def _weights(self, module: nn.Module) -> list[Tensor]:
        state = module.state_dict(keep_vars=True)
        return [state[name] for name in self._average]


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
