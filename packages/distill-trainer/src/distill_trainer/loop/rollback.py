"""The state before an iteration, so that a stop need not wait for the iteration's end."""

from __future__ import annotations

import copy

import torch
from distill_protocols import RunState

from distill_trainer.distribution.tensors import persistent_buffers, read_buffer


class RollbackPoint:
    """The state of a run before an iteration: ``take`` it, ``restore`` it while no optimizer has
    stepped.

    It holds what a checkpoint holds and micro steps move: generators (the run's and torch's own),
    the loader's position, the method's ``state_dict``, persistent buffers of trainable roles
    (batch norm and the like). Weights, optimizers, schedulers and averages have not moved yet. So
    the state after ``restore`` is, bit for bit, that of the iteration before. The run ends then:
    an iterator over the data that is already open does not go back. What a checkpoint holds is
    another snapshot, the checkpointer's own.

    ``take`` comes with every iteration and is cheap: generator states are some KB and live on the
    host, buffers are copied on their own device. It makes no device wait, but for the scale of
    fp16 scaling, whose step waits anyway.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._buffers = persistent_buffers(run.method.bundle)
        self.take()

    def take(self) -> None:
        """Remember the state as it is now."""
        run = self._run
        self._iteration, self._metrics = run.iteration, run.metrics
        # Copies, because a loader or a method may return its own tables, which move on.
        self._loader = copy.deepcopy(run.loader.state_dict())
        self._method = copy.deepcopy(run.method.state_dict())
        self._method_of_rank = run.method.rank_state()  # Never written to again: no copy.
        self._values = [read_buffer(module, name).clone() for module, name in self._buffers]
        self._streams = run.streams.state_dict()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Put the run back where ``take`` found it, and drop its gradients."""
        run = self._run
        run.method.optimizers_zero_grad(run.iteration)
        # What was measured in that iteration is still what its checkpoint is judged by.
        run.iteration, run.metrics = self._iteration, self._metrics
        for (module, name), value in zip(self._buffers, self._values, strict=True):
            read_buffer(module, name).copy_(value)
        run.method.load_state_dict(self._method)
        run.method.load_rank_state(self._method_of_rank)
        run.loader.load_state_dict(self._loader)
        # Generators last: anything above may have drawn from them.
        run.streams.load_state_dict(self._streams)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
