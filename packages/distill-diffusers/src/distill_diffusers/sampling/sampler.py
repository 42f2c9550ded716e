"""The sampler: from noise to clean latents by one SamplerSpec, as pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from distill_protocols import ContractError, RowGenerators, SamplerSpec
from torch import Tensor

from distill_diffusers.calls import flow
from distill_diffusers.sampling.scheduler import unipc_scheduler

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, T, H, W], t [B]) -> v [B, C, T, H, W], guidance included."""

ChunkVelocity = Callable[[Tensor, Tensor, int, bool], Tensor]
"""(x_t, t, first frame, store) -> v of a chunk after its past; ``store``: it becomes past for those
that follow."""


def sample(
    velocity: Velocity,
    spec: SamplerSpec,
    noise: Tensor,
    generators: RowGenerators | None = None,
    *,
    exit_step: int | None = None,
    requires_grad: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk ``spec.sigmas()`` down to 0, in fp32, or return the x0 that ``exit_step`` predicts.

    ODE: Euler, ``x <- x + (s' - s) v``; or UniPC, by diffusers' own scheduler. Stochastic:
    ``x0 = x - s v``, then ``(1 - s') x0 + s' eps`` with fresh noise (Song et al. 2023, algorithm 1;
    DMD2, Yin et al. 2024, section 4.4). The order of operations is that of diffusers'
    FlowMatchEulerDiscreteScheduler, so that an exported model gives the same clip there.

    Args:
        noise: x at the first sigma [B, C, T, H, W].
        generators: feed the fresh noise, one a row; their device may differ from the latents'.
        exit_step: the last call to make, its x0 the result; None: the last of all.
        requires_grad: that call is made with gradient. All others never are.
        on_step: called before each call with its step and x there.

    Raises:
        ContractError: a stochastic spec of more than one step without one generator a row, or an
            exit step that the spec does not have, or whose solver has none.
    """
    if spec.solver == "unipc":
        if exit_step is not None or requires_grad:
            raise ContractError(
                f"an exit step ({exit_step}) or a gradient of a sampler with solver unipc: what "
                "it returns is made of several calls, so a call of its own trains nothing that it "
                "samples. Use solver euler where a role is trained"
            )
        return _sample_unipc(velocity, spec, noise, on_step)
    last = spec.steps - 1 if exit_step is None else exit_step
    if not 0 <= last < spec.steps:
        raise ContractError(
            f"exit step {exit_step} of a sampler of {spec.steps} steps: they are 0 .. "
            f"{spec.steps - 1}"
        )
    if spec.stochastic and spec.steps > 1:
        why = f"a stochastic sampler of {spec.steps} steps draws noise at each"
        generators = _checked_generators(generators, why, noise)
    sigmas = torch.tensor([*spec.sigmas(), 0.0], dtype=torch.float32, device=noise.device)
    x = noise.float()
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        at_exit = step == last
        if on_step is not None:
            on_step(step, x)
        with torch.set_grad_enabled(requires_grad and at_exit):
            v = velocity(x, (sigma * 1000).expand(x.shape[0])).float()
            if at_exit:
                return x - sigma * v  # x0; at the last level the same bits as Euler's step to 0
            if not spec.stochastic:
                x = x + (after - sigma) * v
                continue
            assert generators is not None  # _checked_generators raises otherwise
            fresh = generators.normal(x.shape[1:]).to(x.device)
            x = (1 - after) * (x - sigma * v) + after * fresh
    raise AssertionError("a spec has at least one step")


@torch.no_grad()
def _sample_unipc(
    velocity: Velocity,
    spec: SamplerSpec,
    noise: Tensor,
    on_step: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """Walk by diffusers' scheduler as ``WanPipeline`` does: one of its own for each clip, since it
    keeps the outputs of earlier calls."""
    scheduler = unipc_scheduler(spec)
    x = noise.float()
    for step, t in enumerate(scheduler.timesteps):
        if on_step is not None:
            on_step(step, x)
        v = velocity(x, t.to(x.device, torch.float32).expand(x.shape[0]))
        x = scheduler.step(v.float(), t, x, return_dict=False)[0]
    return x


def sample_chunks(
    velocity: ChunkVelocity,
    spec: SamplerSpec,
    noises: Iterable[Tensor],
    generators: RowGenerators | None = None,
    *,
    exit_steps: Iterable[int] | None = None,
    requires_grad: Iterable[bool] | None = None,
    first_frame: int = 0,
    stores_last: bool = False,
) -> Iterator[Tensor]:
    """Sample chunk after chunk by ``spec``, each on the past of those before it (Self-Forcing,
    Huang et al. 2025, algorithm 2).

    A chunk becomes past by one more call, on its clean latents. The last chunk needs no such call,
    unless another walk goes on from it.

    Args:
        noises: x of each chunk at the first sigma [B, C, T of the chunk, H, W]; the next is asked
            for only after the chunk before it was yielded.
        exit_steps, requires_grad: for each chunk, see ``sample``; None: the last step, without
            gradient.
        first_frame: place in the video of the first chunk, where what is past ends.
        stores_last: the last chunk becomes past too.

    Raises:
        ContractError: as ``sample``; or context noise (``spec``) without generators.
    """
    first = first_frame
    clean: Tensor | None = None
    exits = itertools.repeat(None) if exit_steps is None else exit_steps
    gradients = itertools.repeat(False) if requires_grad is None else requires_grad
    for noise, exit_step, gradient in zip(noises, exits, gradients):  # noqa: B905 - some are endless
        if clean is not None:
            _store_past(velocity, clean, first - clean.shape[2], spec.context_noise, generators)
        clean = sample(
            lambda x, t, at=first: velocity(x, t, at, False),
            spec,
            noise,
            generators,
            exit_step=exit_step,
            requires_grad=gradient,
        )
        first += noise.shape[2]
        yield clean
    if stores_last and clean is not None:
        _store_past(velocity, clean, first - clean.shape[2], spec.context_noise, generators)


@torch.no_grad()
def _store_past(
    velocity: ChunkVelocity,
    clean: Tensor,
    first: int,
    context_noise: float,
    generators: RowGenerators | None,
) -> None:
    # The past is what inference will see of a chunk: clean latents, or those at t = context_noise.
    clean = clean.detach()
    t = torch.full((clean.shape[0],), context_noise, dtype=torch.float32, device=clean.device)
    if context_noise > 0:
        checked = _checked_generators(generators, f"context noise {context_noise} is drawn", clean)
        clean = flow.add_noise(clean, checked.normal(clean.shape[1:]).to(clean.device), t)
    velocity(clean, t, first, True)


def _checked_generators(generators: RowGenerators | None, why: str, noise: Tensor) -> RowGenerators:
    if generators is None:
        raise ContractError(
            f"{why}, so it needs generators: the global one would make a clip depend on whatever "
            "drew before. Give RowGenerators, one a row"
        )
    if len(generators) != len(noise):
        raise ContractError(
            f"{len(generators)} generators for {len(noise)} rows of noise; there must be one a "
            "row, so that no clip depends on its neighbours"
        )
    return generators
