"""What a step computes and moves."""

from __future__ import annotations

import json

import torch
from attrs import evolve
from distill_protocols import Batch, Condition, DataError, SampleView, StepResult, map_latents

from distill_conformance.failures import (
    applies_if,
    require,
    require_close,
    require_equal,
    require_shape,
)
from distill_conformance.method_case import (
    MethodCase,
    accumulate,
    gradients,
    part,
    restore_state,
    run_iteration,
    saved_state,
    weights,
)

SIZE = 4


def check_stepping(case: MethodCase) -> None:
    """In every iteration, the roles of ``turns``, those that get a gradient, the optimizers that
    step and the schedulers that move are the same.

    Otherwise an optimizer steps on nothing, or gradients of one turn are left for the next.
    """
    method = case.build()
    for iteration in range(1, case.iterations + 1):
        turns = set(case.config.turns(iteration))
        rates = {k: s.last_epoch for k, s in method.scheduler_dict.items()}
        offered = {_role(key) for key in method.get_optimizers(iteration)}
        require(offered == turns, f"iteration {iteration}: optimizers of {offered}, turns {turns}")
        done = run_iteration(method, [case.batch(2, iteration)], iteration)
        reached = {_role(key) for key in done.gradients}
        require(
            reached == turns, f"iteration {iteration}: gradients reach {reached}, turns {turns}"
        )
        stepped = {_role(key) for key in done.stepped}
        require(stepped == turns, f"iteration {iteration}: {stepped} stepped, turns {turns}")
        moved = {k for k, s in method.scheduler_dict.items() if s.last_epoch != rates[k]}
        require(
            moved == set(done.stepped) & method.scheduler_dict.keys(),
            f"iteration {iteration}: schedulers {moved} moved, optimizers {done.stepped} stepped",
        )
        require(not gradients(method), "gradients are left after optimizers_zero_grad")


def check_isolation(case: MethodCase) -> None:
    """Weights of the roles of the turn move, all others stay, and frozen roles get no gradient.

    Otherwise a student's loss moves its critic, or a teacher follows its student.
    """
    method = case.build()
    frozen = {need.name for need in case.config.roles if not need.trainable}
    for iteration in range(1, case.iterations + 1):
        before = weights(method)
        done = run_iteration(method, [case.batch(2, iteration)], iteration)
        stray = frozen & {_role(key) for key in done.gradients}
        require(not stray, f"iteration {iteration}: frozen {stray} get a gradient")
        after = weights(method)
        moved = {_role(key) for key in before if not torch.equal(before[key], after[key])}
        turns = set(case.config.turns(iteration))
        require(moved == turns, f"iteration {iteration}: weights of {moved} move, turns {turns}")
        for name, role in method.bundle.roles.items():
            flags = {p.requires_grad for m in role.modules.values() for p in m.parameters()}
            require(
                flags == {role.trainable},
                f"after iteration {iteration}, requires_grad of {name!r} is {flags}",
            )


def check_losses(case: MethodCase) -> None:
    """A step gives scalar finite losses, ``total_loss`` among them, and detached outputs; the
    config names all losses, and nothing that the step does not measure.

    The trainer differentiates the total, logs the others, and keeps outputs for callbacks. A run
    may keep its checkpoints by what the config names.
    """
    method = case.build()
    for iteration in range(1, case.iterations + 1):
        result = method.single_train_step(case.batch(2, iteration), iteration)
        require("total_loss" in result.loss_map, f"no total_loss among {sorted(result.loss_map)}")
        for name, loss in result.loss_map.items():
            require_shape(loss, (), f"loss {name!r}")
            require(bool(loss.isfinite()), f"loss {name!r} is {float(loss)}")
        _check_names(case.config.metrics(iteration), result, iteration)
        require(result.loss_map["total_loss"].requires_grad, "total_loss has no gradient")
        for name, value in result.outputs.items():
            require(not value.requires_grad, f"output {name!r} keeps the graph of the step")
        require(
            tuple(method.batch_ids(case.batch(2, iteration))) in ((), case.batch(2, 0).ids),
            "batch_ids are not those of the batch",
        )


def _check_names(named: tuple[str, ...], result: StepResult, iteration: int) -> None:
    """Compare the metrics that a config names with those of a step."""
    losses = {f"loss/{name}" for name in result.loss_map}
    outputs = {name for name, value in result.outputs.items() if value.ndim == 0}
    unnamed = sorted(losses - set(named))
    require(not unnamed, f"iteration {iteration}: config.metrics does not name {unnamed}")
    absent = sorted(set(named) - losses - outputs)
    require(not absent, f"iteration {iteration}: config.metrics names {absent}, not measured")


def check_accumulation(case: MethodCase) -> None:
    """A batch of four, two micro batches of two and four of one give the same losses and gradients.

    Otherwise the effective batch size depends on the memory of a GPU.
    """
    config = case.accumulation_config
    iterations = _one_of_each_turn(case)
    for iteration in iterations:
        outcomes = []
        for size in (SIZE, 2, 1):
            method = case.build(config=config)
            batch = case.batch(SIZE, 1)
            parts = [part(batch, i, i + size) for i in range(0, SIZE, size)]
            result = accumulate(method, parts, iteration)
            outcomes.append((size, result.loss_map, gradients(method)))
        _, losses, found = outcomes[0]
        for size, other_losses, other in outcomes[1:]:
            what = f"iteration {iteration}, micro batches of {size} and one of {SIZE}"
            for name, loss in losses.items():
                require_close(other_losses[name], loss, f"{what}: {name}", rtol=case.rtol)
            require(other.keys() == found.keys(), f"{what}: gradients of {sorted(other)}")
            for key, gradient in found.items():
                error = (other[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
                require(
                    float(error) < case.rtol, f"{what}: gradients of {key} differ by {error:.2g}"
                )


def check_neighbours(case: MethodCase) -> None:
    """What a sample adds to the loss does not depend on the other samples of the batch.

    Otherwise a normaliser of the batch makes one sample count more beside others.
    """
    config = case.accumulation_config
    for iteration in _one_of_each_turn(case):
        totals = []
        for seeds in ((1, 2), (1, 3), (4, 2), (4, 3)):
            first, second = (part(case.batch(2, seed), i, i + 1) for i, seed in enumerate(seeds))
            batch = _joined(first, second)
            method = case.build(config=config)
            loss = method.single_train_step(batch, iteration).loss_map["total_loss"]
            totals.append(loss.detach().double())
        # With a sum over samples, L(a, b) - L(a, c) is the same for every a.
        require_close(
            totals[0] - totals[1],
            totals[2] - totals[3],
            f"iteration {iteration}: what the second sample adds, beside two others",
            rtol=case.rtol,
            atol=case.rtol * float(torch.stack(totals).abs().max()),
        )


def check_resume(case: MethodCase) -> None:
    """Saved after k iterations and restored into other models, a method goes on bit for bit.

    Otherwise a resumed run is another run.
    """
    k, m = case.iterations // 2 + 1, 4
    straight = case.build()
    for iteration in range(1, k + 1):
        run_iteration(straight, [case.batch(2, iteration)], iteration)
    state = saved_state(straight)
    state["method"] = json.loads(json.dumps(state["method"]))
    resumed = case.build(models=case.models(99))
    restore_state(resumed, state)
    for iteration in range(k + 1, k + m + 1):
        batch = case.batch(2, iteration)
        expected = run_iteration(straight, [batch], iteration)
        found = run_iteration(resumed, [batch], iteration)
        for name, loss in expected.losses.items():
            require_equal(found.losses[name], loss, f"{name} of iteration {iteration}, resumed")
        require(found.stepped == expected.stepped, "other optimizers step after a resume")
    for name, value in weights(straight).items():
        require_equal(weights(resumed)[name], value, f"{name} after a resume")
    require(resumed.state_dict() == straight.state_dict(), "state_dict differs after a resumed run")


def check_logged_samples(case: MethodCase) -> None:
    """Validation clips are functions of the seed and of a row's place, and of nothing else.

    Ranks sample a part each; clips of two validations are compared by eye.
    """
    method = case.build()
    spec = method.sampler_spec
    require(
        spec == case.config.student_sampler,
        f"sampler_spec is {spec}, and the config's student_sampler {case.config.student_sampler}",
    )
    applies_if(spec is not None, "the method does not sample its student")
    views = [SampleView(name="one", role="student")]
    cond = case.batch(2, 0).cond
    streams = method.streams.state_dict()
    clips = method.sample_for_logging(views, cond, seed=3)["one"]
    again = method.sample_for_logging(views, cond, seed=3)["one"]
    require_equal(again, clips, "clips of two validations with one seed")
    require(bool((clips >= 0).all() and (clips <= 1).all()), "clips reach beyond [0, 1]")
    second = method.sample_for_logging(views, cond[1:2], seed=3, rows=[1])["one"]
    require_close(second, clips[1:2], "the second clip, sampled by a rank of its own")
    other = method.sample_for_logging(views, cond, seed=4)["one"]
    require(not torch.equal(other, clips), "the seed of the noise has no effect")
    after = method.streams.state_dict()
    require(
        streams.keys() == after.keys() and all(torch.equal(streams[k], after[k]) for k in streams),
        "validation draws from the streams of training",
    )


def check_captions_alone(case: MethodCase) -> None:
    """Captions alone give the losses that clips would, if ``needs_latents`` is False; else some
    turn reads the latents, and refuses a batch without.

    A run is refused or let through by what the config says, before anything is loaded.
    """
    batch = case.batch(2, 0)
    alone = evolve(batch, latents=None, latent_shape=batch.latent_shape)
    refused = False
    for iteration in _one_of_each_turn(case):
        try:
            result = case.build().single_train_step(alone, iteration)
        except (DataError, AttributeError, TypeError):  # the latter two: what None gives
            refused = True
            require(
                case.config.needs_latents,
                f"iteration {iteration} reads latents, but config.needs_latents is False",
            )
            continue
        with_latents = case.build().single_train_step(batch, iteration)
        for name, loss in with_latents.loss_map.items():
            require_equal(result.loss_map[name], loss, f"{name} of captions alone")
    require(
        refused or not case.config.needs_latents,
        "config.needs_latents is True, but no turn reads them: captions alone would do",
    )


def _one_of_each_turn(case: MethodCase) -> list[int]:
    """Return the first iteration of each combination of roles."""
    first: dict[tuple[str, ...], int] = {}
    for iteration in range(1, case.iterations + 1):
        first.setdefault(tuple(sorted(case.config.turns(iteration))), iteration)
    return list(first.values())


def _joined(*parts: Batch) -> Batch:
    held = [p.trajectory for p in parts if p.trajectory is not None]
    return evolve(
        parts[0],
        latents=map_latents(
            lambda *tensors: torch.cat(tensors), *(part.clean_latents for part in parts)
        ),
        cond=Condition.cat([p.cond for p in parts]),
        ids=tuple(identity for p in parts for identity in p.ids),
        trajectory=torch.cat(held) if held else None,
    )


def _role(key: str) -> str:
    return key.split(".")[0]
