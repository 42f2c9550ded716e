"""Gradients averaged over processes that each hold all of a role (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distill_protocols import StepResult, TrainableMethod
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from distill_trainer.shards import is_shard


class DDPTrainStepWrapper:
    """A method whose step goes through ``DistributedDataParallel.forward``.

    So DDP knows of each step, though it is no ``forward()``: which weights it reached, and that
    their gradients are to be averaged. ``method.single_train_step`` itself would leave every
    process to its own gradients, silently.

    A step goes through a DDP of those modules whose optimizers its iteration steps, so another
    role's turn sends nothing of this one's. It holds the parameters that train (of LoRA roles: the
    adapters), if they are whole, and nothing else. Weights that no process's step reached keep the
    gradient None. At the start rank 0's weights are copied to all. Only the total loss is
    differentiated, so the other terms come back without gradient.

    A weight is in one DDP at a time: each holds a second copy of its gradients, and takes whatever
    a backward pass reaches for reached by its own next step. So where modules learn now together
    and now alone, one is made for each change (milliseconds).

    All processes make it, and step it, alike.
    """

    def __init__(self, method: TrainableMethod) -> None:
        self._method = method
        self._whole = {
            f"{name}.{key}": whole
            for name, role in method.bundle.roles.items()
            for key in role.modules
            if (whole := [p for p in role.trained_parameters(key).values() if not is_shard(p)])
        }
        self._of_set: dict[frozenset[str], DistributedDataParallel] = {}
        self._turn: frozenset[str] = frozenset()
        self._sync = True
        for parameters in self._whole.values():
            for parameter in parameters:
                distributed.broadcast(parameter.detach(), 0)

    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        """As the method's."""
        step = self._method.single_train_step
        self._turn = frozenset(self._whole).intersection(self._method.get_optimizers(iteration))
        if not self._turn:
            return step(batch, iteration)
        if self._turn not in self._of_set:
            self._keep(lambda keys, _: keys.isdisjoint(self._turn))
            self._of_set[self._turn] = self._averaging(self._turn)
        ddp = self._of_set[self._turn]
        with contextlib.nullcontext() if self._sync else ddp.no_sync():
            return StepResult(*ddp(step, batch, iteration))

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around a step and its backward pass: only in the last one of an iteration gradients are
        averaged, the sums of all."""
        self._sync = last
        yield
        # What was reached out of turn: the next step may not reach it.
        self._keep(
            lambda keys, ddp: keys == self._turn or all(p.grad is None for p in ddp.parameters())
        )

    def _keep(self, wanted: Callable[[frozenset[str], DistributedDataParallel], bool]) -> None:
        self._of_set = {keys: ddp for keys, ddp in self._of_set.items() if wanted(keys, ddp)}

    def _averaging(self, keys: frozenset[str]) -> DistributedDataParallel:
        parameters = [p for key, whole in self._whole.items() if key in keys for p in whole]
        learns = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                # It may be frozen for the moment, and DDP would never look at it again.
                parameter.requires_grad_(True)
            return DistributedDataParallel(
                _Held(parameters),
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                init_sync=False,
            )
        finally:
            for parameter, requires_grad in zip(parameters, learns, strict=True):
                parameter.requires_grad_(requires_grad)


class _Held(nn.Module):
    """Parameters, and a forward() that is somebody else's step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, step: Any, batch: Any, iteration: int) -> StepResult:
        return step(batch, iteration)
