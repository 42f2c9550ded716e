"""The sampler, and the rollout of training against it."""

from __future__ import annotations

from typing import get_args

import torch
from attrs import evolve
from distill_protocols import (
    CapabilityError,
    ContractError,
    DynamicShift,
    RowGenerators,
    SamplerSpec,
    Solver,
    StopRequested,
)
from torch import Tensor

from distill_conformance.adapter_case import (
    ROWS,
    AdapterCase,
    counted_calls,
    normal,
    row_generators,
)
from distill_conformance.failures import must_raise, require, require_equal, require_shape

SPECS = (
    SamplerSpec(steps=1),
    SamplerSpec(steps=3, shift=3.0),
    SamplerSpec(steps=3, shift=3.0, stochastic=True),
    SamplerSpec(steps=2, timesteps=(1000.0, 400.0), stochastic=True),
)
THREE = SPECS[2]


def check_sample_shape(case: AdapterCase) -> None:
    """``sample`` gives clean latents of the run's shape, fp32, without gradient."""
    cond = case.condition()
    for role in case.model_roles:
        clean = _sample(case, role, THREE)
        require_shape(clean, (ROWS, *case.adapter.latent_shape), f"samples of {role!r}")
        require(clean.dtype == torch.float32, f"samples of {role!r} are {clean.dtype}, not fp32")
        require(not clean.requires_grad, f"sampling {role!r} keeps a graph")
        require(bool(clean.isfinite().all()), f"samples of {role!r} are not finite")
        noise = case.noise()
        before = noise.clone()
        case.adapter.sample(role, SPECS[1], noise, cond)
        require_equal(noise, before, "noise before and after sampling")


def check_samples_are_independent(case: AdapterCase) -> None:
    """A clip does not depend on its neighbours in the batch, nor does its fresh noise.

    Otherwise validation clips change with the number of processes.
    """
    cond = case.condition()
    for role in case.model_roles:
        both = _sample(case, role, THREE)
        for i in range(ROWS):
            row = slice(i, i + 1)
            alone = case.adapter.sample(
                role, THREE, case.noise()[row], cond[row], generators=row_generators([i])
            )
            case.require_close(both[row], alone, f"clip {i} of {role!r} in a batch and alone")


def check_guided_samples(case: AdapterCase) -> None:
    """Sampling reads the spec's guidance: 1 needs no negative condition, and others change clips.

    A validation view with guidance would otherwise show the model without.
    """
    case.need("supports_cfg")
    cond, negative = case.condition(), case.negative
    role = case.model_roles[0]
    plain = case.adapter.sample(role, SPECS[1], case.noise(), cond)
    guided_spec = SamplerSpec(steps=3, shift=3.0, guidance=4.0)
    guided = case.adapter.sample(role, guided_spec, case.noise(), cond, neg_cond=negative)
    require(not torch.equal(plain, guided), "guidance in a SamplerSpec has no effect")
    for i in range(ROWS):
        row = slice(i, i + 1)
        alone = case.adapter.sample(
            role, guided_spec, case.noise()[row], cond[row], neg_cond=negative
        )
        case.require_close(guided[row], alone, f"guided clip {i} in a batch and alone")


def check_sampler_follows_the_spec(case: AdapterCase) -> None:
    """The sampler calls the model at ``spec.sigmas()`` and moves along its prediction.

    Otherwise a few-step student is sampled at other times than it was trained for.
    """
    cond = case.condition()
    for role in case.model_roles:
        if role in case.causal_roles:
            continue
        for spec in SPECS:
            seen: list[tuple[int, Tensor]] = []
            generators = row_generators()
            clean = case.adapter.sample(
                role, spec, case.noise(), cond, generators=generators,
                on_step=lambda step, x, seen=seen: seen.append((step, x)),
            )  # fmt: skip
            steps = [step for step, _ in seen]
            require(steps == list(range(spec.steps)), f"on_step was called with {steps} for {spec}")
            require_equal(seen[0][1], case.noise(), "x_t of step 0 and the noise")
            expected = _walk_by_hand(case, role, spec, [x for _, x in seen])
            case.require_close(clean, expected, f"a sample of {role!r} and one by hand ({spec})")


def _walk_by_hand(case: AdapterCase, role: str, spec: SamplerSpec, seen: list[Tensor]) -> Tensor:
    """x0 of the last x_t; requires that each x_t follows from the one before."""
    cond, sigmas, generators = case.condition(), spec.sigmas(), row_generators()
    for step, (sigma, x_t) in enumerate(zip(sigmas, seen, strict=True)):
        t = torch.full((ROWS,), 1000 * sigma)
        with torch.no_grad():
            x0 = case.adapter.forward(role, x_t, t, cond, fwd_pred_type="x0")
        if step + 1 == spec.steps:
            return x0
        after = torch.full((ROWS,), 1000 * sigmas[step + 1])
        if spec.stochastic:
            noise = generators.normal(x_t.shape[1:])
        else:  # Euler's step keeps the noise that x_t and x0 imply.
            noise = (x_t - (1 - sigma) * x0) / sigma
        expected = case.adapter.add_noise(x0, noise, after)
        case.require_close(seen[step + 1], expected, f"x_t of step {step + 1} of {role!r}")
    raise AssertionError("a spec has at least one step")


def check_rollout_is_sample(case: AdapterCase) -> None:
    """Without gradient and with the last step as exit of every chunk, a rollout is a sample, bit
    for bit.

    Otherwise a student is trained on other clips than it makes.
    """
    for role in case.model_roles:
        exits = len(case.chunks(role))
        for spec in SPECS:
            with torch.no_grad():
                rolled = _rollout(case, role, spec, [spec.steps - 1] * exits)
            require_equal(
                rolled, _sample(case, role, spec), f"rollout and sample of {role!r} ({spec})"
            )


def check_rollout_exits(case: AdapterCase) -> None:
    """A rollout makes the calls up to its exit and no more, the exit call alone with gradient.

    Otherwise training costs the calls that it does not use, or keeps the graph of all of them.
    """
    for role in case.model_roles:
        chunks = len(case.chunks(role))
        handle = case.bundle[role]
        for k in range(THREE.steps):
            polls: list[int] = []
            with case.clean_gradients(), counted_calls(handle) as calls:
                rolled = _rollout(
                    case, role, THREE, [k] * chunks, poll=lambda polls=polls: polls.append(1)
                )
            with_gradient = sum(gradient for _, gradient in calls)
            require(
                with_gradient == chunks,
                f"a rollout of {role!r} of {chunks} chunks with exit {k} makes {with_gradient} "
                "calls with gradient: there must be one a chunk",
            )
            without = len(calls) - with_gradient
            stored = (chunks - 1) * len(handle.modules)
            require(
                without == k * chunks + stored,
                f"a rollout of {role!r} with exit {k} makes {without} calls before its exits; "
                f"there must be {k} a chunk and one that stores each chunk but the last",
            )
            require(
                len(polls) >= (k + 1) * chunks,
                f"poll was called {len(polls)} times for {(k + 1) * chunks} steps",
            )
            require(
                rolled.requires_grad == handle.trainable,
                f"the clean latents of {role!r} have gradient {rolled.requires_grad}",
            )
            require_shape(rolled, (ROWS, *case.adapter.latent_shape), "a rollout")


def check_rollout_predicts_at_its_exit(case: AdapterCase) -> None:
    """A rollout that exits at step k is the x0 that the model predicts at the sampler's x_t of k.

    Otherwise a distilled student learns at times that its sampler never calls.
    """
    cond = case.condition()
    for role in case.model_roles:
        if role in case.causal_roles:
            continue
        seen: list[Tensor] = []
        case.adapter.sample(
            role, THREE, case.noise(), cond, generators=row_generators(),
            on_step=lambda _, x, seen=seen: seen.append(x),
        )  # fmt: skip
        for k, sigma in enumerate(THREE.sigmas()):
            shown: list[Tensor] = []
            with torch.no_grad():
                rolled = _rollout(
                    case, role, THREE, [k], on_step=lambda _, x, shown=shown: shown.append(x)
                )
            require(
                len(shown) == k + 1 and all(map(torch.equal, shown, seen)),
                f"on_step of a rollout of {role!r} that exits at step {k} was shown {len(shown)} "
                "x_t, or not those of the sampler",
            )
            with torch.no_grad():
                t = torch.full((ROWS,), 1000 * sigma)
                x0 = case.adapter.forward(role, seen[k], t, cond, fwd_pred_type="x0")
            case.require_close(rolled, x0, f"a rollout of {role!r} that exits at step {k}")


def check_rollout_trains_the_role(case: AdapterCase) -> None:
    """The gradient of a rollout reaches the role's weights, and none where ``requires_grad`` is
    False.

    Methods that look at the end of a video alone train through its last chunks.
    """
    for role in case.model_roles:
        handle = case.bundle[role]
        if not handle.trainable:
            continue
        chunks = len(case.chunks(role))
        with case.clean_gradients():
            _rollout(case, role, THREE, [1] * chunks).square().mean().backward()
            grads = [
                p.grad
                for key in handle.modules
                for p in handle.trained_parameters(key).values()
                if p.grad is not None
            ]
            require(
                any(bool(g.abs().sum() > 0) for g in grads),
                f"no gradient of a rollout reaches role {role!r}",
            )
        flags = [False] * chunks
        rolled = _rollout(case, role, THREE, [1] * chunks, requires_grad=flags)
        require(not rolled.requires_grad, f"{role!r} has a graph with requires_grad False")


def check_generators(case: AdapterCase) -> None:
    """A stochastic spec without one generator a row raises ``ContractError``.

    The global generator would make a clip depend on whatever drew before.
    """
    cond = case.condition()
    for role in case.model_roles:
        for what, generators in {
            "no generators": None,
            "one generator for two rows": row_generators([0]),
        }.items():
            with must_raise(ContractError, f"a stochastic sample of {role!r} with {what}"):
                case.adapter.sample(role, THREE, case.noise(), cond, generators=generators)


def check_stop(case: AdapterCase) -> None:
    """``poll`` is called before each step, what it raises ends the sampling, and the next one is
    as if nothing had happened.

    A preempted job has seconds; a cache that stays full spoils the next clip.
    """
    for role in case.model_roles:
        expected = _sample(case, role, THREE)
        steps = THREE.steps * len(case.chunks(role))
        for at in (1, 2):
            polls: list[int] = []

            def poll(polls: list[int] = polls, at: int = at) -> None:
                polls.append(1)
                if len(polls) == at:
                    raise StopRequested("conformance")

            with (
                counted_calls(case.bundle[role]) as calls,
                must_raise(StopRequested, f"a stop in step {at} of {role!r}"),
            ):
                case.adapter.sample(
                    role, THREE, case.noise(), case.condition(), generators=row_generators(),
                    poll=poll,
                )  # fmt: skip
            require(
                len(calls) < steps and len(calls) == at - 1,
                f"a stop before step {at} lets {len(calls)} calls of {role!r} happen",
            )
        require_equal(_sample(case, role, THREE), expected, f"{role!r} sampled after a stop")


def check_sampler_refusals(case: AdapterCase) -> None:
    """Specs and exits that have no meaning raise ``ContractError``."""
    cond = case.condition()
    for role in case.model_roles:
        chunks = len(case.chunks(role))
        open_shift = SamplerSpec(steps=2, shift=DynamicShift())
        with must_raise(ContractError, "sampling with a shift that depends on unknown tokens"):
            case.adapter.sample(role, open_shift, case.noise(), cond)
        with must_raise(ContractError, "a rollout that exits after its last step"):
            _rollout(case, role, THREE, [THREE.steps] * chunks)
        with must_raise(ContractError, "a rollout with one exit step too many"):
            _rollout(case, role, THREE, [0] * (chunks + 1))
        frames = case.adapter.latent_shape[1]
        longer = normal(ROWS, case.adapter.latent_shape[0], frames + 1, *case.noise().shape[3:])
        with must_raise(ContractError, "sampling more frames than the run's clips have"):
            case.adapter.sample(role, SPECS[0], longer, cond)


def check_solvers(case: AdapterCase) -> None:
    """A solver that ``capabilities.solvers`` states is used, clip by clip; another is refused.

    A family that does not know one would otherwise sample by Euler, and say the other's name in
    reports and exports.
    """
    cond, noise = case.condition(), case.noise()
    for role in case.model_roles:
        for solver in get_args(Solver):
            spec = SamplerSpec(steps=4, shift=3.0, solver=solver)
            if solver not in case.capabilities.solvers:
                with must_raise(CapabilityError, f"sampling {role!r} by {solver}, not stated"):
                    case.adapter.sample(role, spec, noise, cond)
                continue
            both = case.adapter.sample(role, spec, noise, cond)
            for i in range(ROWS):
                row = slice(i, i + 1)
                alone = case.adapter.sample(role, spec, noise[row], cond[row])
                case.require_close(both[row], alone, f"clip {i} by {solver} in a batch and alone")
            if solver == "euler":
                continue
            euler = case.adapter.sample(role, evolve(spec, solver="euler"), noise, cond)
            require(not torch.equal(both, euler), f"{solver} of {role!r} gives Euler's clips")
            exits = [spec.steps - 1] * len(case.chunks(role))
            with must_raise(ContractError, f"a rollout of {role!r} by {solver}"):
                _rollout(case, role, spec, exits)


def _sample(case: AdapterCase, role: str, spec: SamplerSpec) -> Tensor:
    return case.adapter.sample(
        role, spec, case.noise(), case.condition(), generators=_generators(spec)
    )


def _rollout(
    case: AdapterCase, role: str, spec: SamplerSpec, exits: list[int], **options
) -> Tensor:
    return case.adapter.rollout(
        role, spec, case.noise(), case.condition(), exit_steps=exits, generators=_generators(spec),
        **options,
    )  # fmt: skip


def _generators(spec: SamplerSpec) -> RowGenerators | None:
    return row_generators() if spec.stochastic else None
