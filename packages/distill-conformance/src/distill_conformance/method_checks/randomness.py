"""Where a method's random numbers come from."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from distill_protocols import RandomStreams

from distill_conformance.adapter_case import counted_calls
from distill_conformance.failures import require, require_equal
from distill_conformance.method_case import MethodCase, run_iteration

SHARED = "shared/"
ROWS = "rows/"


def check_global_random_state(case: MethodCase) -> None:
    """Building and stepping draw nothing from the global generator.

    Otherwise a run cannot be resumed, and a callback that draws changes the training.
    """
    models = case.models(0)
    state = torch.get_rng_state()
    method = case.build(models=models)
    for iteration in range(1, case.iterations + 1):
        run_iteration(method, [case.batch(2, iteration)], iteration)
    require(
        torch.equal(torch.get_rng_state(), state),
        "the method draws from the global random generator; take RandomStreams",
    )


def check_determinism(case: MethodCase) -> None:
    """Two runs with one seed give the same losses, and another seed gives others.

    A method whose draws do not depend on the run's seed cannot be repeated with another one.
    """
    losses = []
    for seed in (5, 5, 6):
        method = case.build(streams=RandomStreams(seed))
        losses.append(
            torch.stack(
                [
                    run_iteration(method, [case.batch(2, i)], i).losses["total_loss"]
                    for i in range(1, 5)
                ]
            )
        )
    require_equal(losses[1], losses[0], "losses of two runs with one seed")
    require(not torch.equal(losses[2], losses[0]), "the seed of the run has no effect")


def check_ranks(case: MethodCase) -> None:
    """Two ranks make the same shared choices and the same calls, and draw different noise.

    Ranks of a sharded model that make different calls wait for each other for ever; ranks that
    draw alike halve the batch.
    """
    methods = [case.build(streams=RandomStreams(0, rank=rank, world_size=2)) for rank in (0, 1)]
    differ = False
    for iteration in range(1, case.iterations + 1):
        batch, losses, calls = case.batch(2, iteration), [], []
        for method in methods:
            with ExitStack() as stack:
                roles = method.bundle.roles.items()
                calls.append({name: stack.enter_context(counted_calls(r)) for name, r in roles})
                losses.append(run_iteration(method, [batch], iteration).losses["total_loss"])
        require(
            calls[0] == calls[1],
            f"iteration {iteration}: the ranks make different calls ({_counts(calls[0])} and "
            f"{_counts(calls[1])}); draw what decides on calls with shared=True",
        )
        differ = differ or not torch.equal(*losses)
    require(differ, "two ranks with the same data have the same losses: they draw the same noise")
    states = [method.streams.state_dict() for method in methods]
    require(
        states[0].keys() == states[1].keys(),
        f"the ranks draw for different purposes: {sorted(states[0].keys() ^ states[1].keys())}",
    )
    for key, value in states[0].items():
        if key.startswith((SHARED, ROWS)):
            require_equal(states[1][key], value, f"the state of {key!r} on two ranks")


def _counts(calls: dict[str, list[tuple[str, bool]]]) -> dict[str, int]:
    return {role: len(made) for role, made in calls.items()}
