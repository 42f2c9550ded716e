"""Gradients averaged over processes that each hold all of a role: the strategy ``ddp``."""

from __future__ import annotations

import torch
from distill_protocols import TrainableMethod
from distill_runtime import Ranks, is_sharded
from torch import distributed


class GradientAverager:
    """Averages gradients in place, once an iteration, after its last backward pass.

    ``DistributedDataParallel`` copies gradients into buckets, which it keeps: two copies while they
    are accumulated, and one in iterations in which the role does not step at all. It also allows
    one backward pass for each forward pass, and a step may have several (``EndingTurns``). Here
    there are the gradients themselves. The price is that nothing is sent while the backward pass
    is still under way.

    At the start rank 0's weights are copied to all: averaged gradients keep equal weights equal,
    and do not make different ones equal. A script that seeds each rank differently would train as
    many models as it has processes.

    All processes make it, and call it, alike.
    """

    def __init__(self, method: TrainableMethod, ranks: Ranks) -> None:
        self._method = method
        self._ranks = ranks
        self._parameters = {
            f"{name}.{key}": [p for p in role.trained_parameters(key).values() if not is_sharded(p)]
            for name, role in method.bundle.roles.items()
            for key in role.modules
        }
        for parameters in self._parameters.values():
            for parameter in parameters:
                distributed.broadcast(parameter.detach(), 0)

    def average(self, iteration: int) -> None:
        """Average the gradients of what steps in ``iteration``.

        A weight that no process's losses reached keeps the gradient None. One that only others'
        reached has zeros here: an expert may be called on some processes alone.
        """
        keys = self._method.get_optimizers(iteration).keys() & self._parameters.keys()
        parameters = [p for key in sorted(keys) for p in self._parameters[key]]
        if not parameters:
            return
        reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        # Over gloo, in the group of the ranks: on an accelerator the host would wait for the step.
        distributed.all_reduce(reached, distributed.ReduceOp.MAX, group=self._ranks.group)
        gradients = []
        for parameter, is_reached in zip(parameters, reached.tolist(), strict=True):
            if is_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if not gradients:
            return
        # Before the sum, which would sooner overflow in 16 bits.
        torch._foreach_div_(gradients, self._ranks.size)
        works = [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in works:
            if work is not None:
                work.wait()
