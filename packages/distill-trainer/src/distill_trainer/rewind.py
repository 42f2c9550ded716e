"""Takes an unfinished iteration back, so that a stop need not wait for its end."""

from __future__ import annotations

import copy

import torch
from distill_protocols import ModelBundle, RunState
from torch import Tensor, nn


class Rewind:
    """``mark`` before an iteration, ``back`` to there while no optimizer has stepped.

    What a checkpoint holds and micro steps move is kept: generators (the run's and torch's own),
    the loader's position, the method's ``state_dict``, persistent buffers of trainable roles
    (batch norm and the like). Weights, optimizers, schedulers and averages have not moved yet. So
    the state after ``back`` is, bit for bit, that of the iteration before.

    ``mark`` comes with every iteration and is cheap: generator states are some KB and live on the
    host, buffers are copied on their own device. It makes no device wait, but for the scale of
    fp16 scaling, whose step waits anyway.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._buffers = persistent_buffers(run.method.bundle)
        self.mark()

    def mark(self) -> None:
        """Remember now."""
        run = self._run
        self._iteration, self._metrics = run.iteration, run.metrics
        # Copies, as either may hand out its own tables.
        self._loader = copy.deepcopy(run.loader.state_dict())
        self._method = copy.deepcopy(run.method.state_dict())
        self._values = [buffer_of(part, name).clone() for part, name in self._buffers]
        self._streams = run.streams.state_dict()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def back(self) -> None:
        """To the mark; gradients are dropped."""
        run = self._run
        run.method.optimizers_zero_grad(run.iteration)
        # What was measured in that iteration is still what its checkpoint is judged by.
        run.iteration, run.metrics = self._iteration, self._metrics
        for (part, name), value in zip(self._buffers, self._values, strict=True):
            buffer_of(part, name).copy_(value)
        run.method.load_state_dict(self._method)
        run.loader.load_state_dict(self._loader)
        # Last: anything above may have drawn.
        run.streams.load_state_dict(self._streams)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def buffer_of(part: nn.Module, name: str) -> Tensor:
    """As it is now."""
    # Looked up each time: a module may put a new tensor into its buffer's place.
    return part.get_buffer(name).detach()


def persistent_buffers(bundle: ModelBundle) -> list[tuple[nn.Module, str]]:
    """(module that has it, its name there) of all that a checkpoint holds of trained roles."""
    found = []
    for role in bundle.roles.values():
        for module in role.modules.values() if role.trainable else ():
            saved = {id(value) for value in module.state_dict(keep_vars=True).values()}
            found += [
                (part, name)
                for part in module.modules()
                for name, buffer in part.named_buffers(recurse=False)
                if id(buffer) in saved
            ]
    return found
