"""Gradients averaged over processes that each hold all of a role (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distill_protocols import StepResult, TrainableMethod
from distill_runtime import is_sharded
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class DDPTrainStepWrapper:
    """A method whose step goes through ``DistributedDataParallel.forward``.

    So DDP knows of each step, though it is no ``forward()``: which weights it reached, and that
    their gradients are to be averaged. ``method.single_train_step`` itself would leave every
    process to its own gradients, silently.

    A step goes through a DDP of those modules whose optimizers its iteration steps, so another
    role's turn sends nothing of this one's. It holds the parameters that train (of LoRA roles: the
    adapters), if they are not sharded, and nothing else. Weights that no process's step reached
    keep the gradient None. At the start rank 0's weights are copied to all. Only the total loss is
    differentiated by way of DDP: what else is differentiated is this process's own.

    A weight is in one DDP at a time: each holds a second copy of its gradients, and takes whatever
    a backward pass reaches for reached by its own next step. So where modules are trained now
    together and now alone, one is made for each change (milliseconds).

    All processes make it, and step it, alike.
    """

    def __init__(self, method: TrainableMethod) -> None:
        self._method = method
        self._parameters = {
            f"{name}.{key}": parameters
            for name, role in method.bundle.roles.items()
            for key in role.modules
            if (
                parameters := [
                    p for p in role.trained_parameters(key).values() if not is_sharded(p)
                ]
            )
        }
        self._ddps: dict[frozenset[str], DistributedDataParallel] = {}
        """By the keys of the modules whose parameters it holds."""
        self._turn: frozenset[str] = frozenset()
        self._averages = True
        # Averaged gradients keep equal weights equal; they do not make different ones equal. A
        # script that seeds each rank differently would train as many models as it has processes.
        for parameters in self._parameters.values():
            for parameter in parameters:
                distributed.broadcast(parameter.detach(), 0)

    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        """Take the method's step, seen by DDP's hooks."""
        step = self._method.single_train_step
        self._turn = frozenset(self._parameters).intersection(
            self._method.get_optimizers(iteration)
        )
        if not self._turn:
            return step(batch, iteration)
        if self._turn not in self._ddps:
            # First drop those that share a weight with the new one: two hooks on one weight would
            # average its gradient twice, each into a buffer of its own.
            self._keep_if(lambda keys, _: keys.isdisjoint(self._turn))
            self._ddps[self._turn] = self._make_ddp(self._turn)
        ddp = self._ddps[self._turn]
        with contextlib.nullcontext() if self._averages else ddp.no_sync():
            inner: list[StepResult] = []
            result = StepResult(*ddp(step, batch, iteration, inner.append))
        # DDP joins all of its outputs into one node of the graph: there, each loss would reach
        # whatever any of them does. The total alone must come from there.
        losses = {**inner[0].loss_map, "total_loss": result.loss_map["total_loss"]}
        return StepResult(losses, result.outputs)

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Surround a step and its backward pass.

        Only in the last micro step of an iteration gradients are averaged: the sums of all micro
        steps, so that the traffic of the others is saved.
        """
        self._averages = last
        yield
        # A DDP whose weights this backward pass reached out of turn counts them as done, and would
        # wait for ever in its next step, which may not reach them.
        self._keep_if(
            lambda keys, ddp: keys == self._turn or all(p.grad is None for p in ddp.parameters())
        )

    def _keep_if(self, wanted: Callable[[frozenset[str], DistributedDataParallel], bool]) -> None:
        self._ddps = {keys: ddp for keys, ddp in self._ddps.items() if wanted(keys, ddp)}

    def _make_ddp(self, keys: frozenset[str]) -> DistributedDataParallel:
        parameters = [p for key, owned in self._parameters.items() if key in keys for p in owned]
        flags = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                # A method may have frozen it for the moment, and DDP would leave it out for good.
                parameter.requires_grad_(True)
            return DistributedDataParallel(
                _ParametersOfAStep(parameters),
                # Without it, weights that a step did not reach (another expert's) would make the
                # backward pass of the next step raise.
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                init_sync=False,
            )
        finally:
            for parameter, requires_grad in zip(parameters, flags, strict=True):
                parameter.requires_grad_(requires_grad)


class _ParametersOfAStep(nn.Module):
    """Parameters, and a ``forward`` that is the step of a method."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameter_list = nn.ParameterList(parameters)

    def forward(
        self, step: Any, batch: Any, iteration: int, seen: Callable[[StepResult], None]
    ) -> StepResult:
        result: StepResult = step(batch, iteration)
        seen(result)
        return result
