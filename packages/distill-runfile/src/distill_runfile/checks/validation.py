"""Roles that are sampled, in validation and by apps that do nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import evolve
from distill_conditioning.buckets import count_held_out, make_buckets
from distill_protocols import PlannedRun, Problem, below
from distill_protocols.planned_run import MAX_T
from distill_trainer.config import PredictionsConfig, ValidationConfig

from distill_runfile.checks.data import describe_data
from distill_runfile.draft import Draft


def check_validation(draft: Draft) -> Iterator[Problem]:
    """Whether the role of each view can be sampled with the view's settings."""
    if draft.validation is None:
        return
    given = draft.validation.given
    # Frames of each prompt's clip are what image-to-video models lack otherwise.
    run = evolve(draft.run, pictured=frozenset()) if given else draft.run
    yield from _given_problems(draft, draft.validation)
    for name, view in draft.validation.views.items():
        problems = (
            *run.role_problems(view.role, ema=view.ema),
            *run.sampler_problems(view.sampler, view.role),
        )
        yield from below(problems, "validation", "views", name)
        if view.latent_frames is not None and (
            why := _is_not_causal(draft, view.role)
            or _is_longer_than_its_picture(draft, view.role, view.latent_frames)
        ):
            yield Problem(("validation", "views", name, "latent_frames"), why)
    if draft.validation.x0 is not None:
        yield from _prediction_problems(run, draft.validation.x0)
    yield from _held_out_problems(draft, draft.validation)


def _given_problems(draft: Draft, validation: ValidationConfig) -> Iterator[Problem]:
    """Whether the models can be given the frames that are given of the prompts' clips."""
    if draft.family is None or not (given := validation.given):
        return
    plugin, config = draft.family.plugin, draft.family.config
    frames = next(iter(plugin.clip_shapes(config)), (None,))[0]
    key = "last_images" if given.first == 0 else "videos" if validation.videos else "images"
    for role in draft.run.roles.values():
        if role.heads is not None:
            continue
        problem = plugin.frame_conditions(role, config).problem(given, frames)
        if problem is not None:
            yield Problem(("validation", key), f"role {role.name!r}: {problem}")
            return


def _is_not_causal(draft: Draft, role: str) -> str | None:
    """Say why ``role`` makes no videos of another length than the run's; None: it does."""
    if draft.family is None or role not in draft.roles:
        return None
    causal = draft.family.plugin.capabilities(draft.family.config).causal_roles
    if role in causal:
        return None
    return (
        f"{role!r} is not causal (causal roles: {', '.join(sorted(causal)) or 'none'}), and makes "
        "a clip as a whole, of the length that it was trained on. Leave it out"
    )


def _is_longer_than_its_picture(draft: Draft, role: str, frames: int) -> str | None:
    """Say why ``role`` makes no video of so many latent frames of a first frame; None: it does."""
    if draft.family is None or role not in draft.roles or not draft.run.clip_frames:
        return None
    longest = draft.run.clip_frames[0]
    spec, family = draft.roles[role].spec, draft.family
    readable = family.plugin.frame_conditions(spec, family.config)
    if frames <= longest or readable.first != "always":
        return None
    return (
        f"{frames}, but {role!r} reads its first frame beside every frame of a clip, and there are "
        f"{longest} of the run's. Use at most these"
    )


def _prediction_problems(run: PlannedRun, x0: PredictionsConfig) -> Iterator[Problem]:
    """Whether the roles can be called at these times."""
    for role in x0.roles:
        path = ("validation", "x0", "roles")
        yield from (Problem(path, problem.message) for problem in run.role_problems(role))
        if role in run.roles and run.roles[role].heads is not None:
            yield Problem(path, f"{role!r} is a discriminator, which predicts no clips")
        low, high = run.time_limits.get(role, (0.0, MAX_T))
        missed = [t for t in x0.t if not low <= t < high and not t == high == MAX_T]
        if missed:
            yield Problem(
                ("validation", "x0", "t"),
                f"{run.describe_limits(role)}, and is asked at t = "
                f"{', '.join(f'{t:g}' for t in missed)} too. Leave these out",
            )


def _held_out_problems(draft: Draft, validation: ValidationConfig) -> Iterator[Problem]:
    """Whether there are samples to measure losses on, which are not trained on."""
    if validation.share is not None and draft.datasets is not None and draft.datasets.sources:
        sizes = [len(bucket) for bucket in make_buckets(draft.datasets.sources)]
        if not any(count_held_out(size, validation.share) for size in sizes):
            yield Problem(
                ("validation", "share"),
                f"{validation.share:g} of {sum(sizes)} samples is none, so there is nothing to "
                "measure on. Hold out more of them, or name data of their own",
            )
    if validation.data is None or draft.data is None:
        return
    path = ("validation", "data", "path")
    if validation.data.path in [one.path for one in draft.data.all_sets]:
        yield Problem(
            path,
            f"{validation.data.path} is trained on, so a loss on it says nothing of other data. "
            "Name another data set, or hold out a share of this one",
        )
    elif not (draft.planning and not Path(validation.data.path).exists()):
        held_out = evolve(draft.data, path=validation.data.path, sets=())
        yield from (Problem(path, text) for text in describe_data(draft, held_out).problems)


def validation_metrics(draft: Draft) -> dict[str, int]:
    """Return names of what a validation measures, with the interval in iterations."""
    validation, method = draft.validation, draft.method
    if validation is None or method is None or not validation.measures_losses:
        return {}
    iterations = range(1, _SCHEDULE + 1)
    names = {name for n in iterations for name in method.config.metrics(n)}
    terms = {name.removeprefix("loss/") for name in names if name.startswith("loss/")}
    if len({method.config.turns(n) for n in iterations}) > 1:
        terms -= {"total_loss"}
    terms |= {*method.config.validation_losses}
    return {
        f"validation/{kind}/{term}": validation.every_steps
        for term in terms
        for kind in ("loss", "drift")
    }


_SCHEDULE = 1_000
"""No schedule of updates is longer."""


def check_sampled(draft: Draft) -> Iterator[Problem]:
    """Whether the one role of a file that trains nothing can be sampled."""
    for name, config in draft.role_configs.items():
        if config.trainable:
            yield Problem(
                ("models", name, "trainable"),
                "true, but nothing is trained here: the role is sampled. Leave the key out",
            )
    if len(draft.written_roles) != 1 and draft.document.values.get("models") is not None:
        names = ", ".join(sorted(draft.written_roles)) or "none"
        yield Problem(
            ("models",),
            f"{names}: one role is sampled, and another would only cost memory. Name just one, "
            "the teacher",
        )
    if draft.sampled is None:
        return
    section, config = draft.sampled
    # The data set brings the pictures that a model cannot be called without.
    run = evolve(draft.run, pictured=frozenset())
    for name in draft.roles:
        yield from below(run.sampler_problems(config.sampler, name), section)
