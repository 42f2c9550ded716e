"""What a run would be, without weights: the text of ``--dry-run``.

Walks the road of a real run up to the meta device, so it needs torch and diffusers, but neither
weights nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill_conditioning import dataset_info
from distill_protocols import RolePlan

from distill_train.memory import Planner
from distill_train.memory_text import memory_sections
from distill_train.schema import RunConfig
from distill_train.text import table

SHOWN_ITERATIONS = 10


def horizon(config: RunConfig, role: str) -> int:
    """How often ``role``'s optimizers step in the whole run: the length of their schedules."""
    steps = range(1, config.training.max_train_steps + 1)
    return sum(role in config.method.turns(iteration) for iteration in steps)


def horizons(config: RunConfig, role: str) -> dict[str, int]:
    """By module, where each of a role's experts takes a share of its steps; else empty.

    The share is what the method expects: which expert learns is drawn, so an expert's own count
    strays from it by about the square root of the count, and a schedule that falls has fallen by
    then or stays that near its end.
    """
    ranges = config.family_plugin.expert_ranges(config.roles[role].spec, config.pipeline)
    steps = horizon(config, role)
    return {
        module: max(1, round(steps * config.method.update_share(role, low, high)))
        for module, (low, high) in ranges.items()
    }


def describe(config: RunConfig, *, world_size: int = 1, device_memory: int | None = None) -> str:
    """The resolved plan as text.

    Args:
        world_size: processes that it is planned for.
        device_memory: bytes of one device, to say whether the run fits.
    """
    planner = Planner(world_size=world_size)
    plans = [planner.plan(config, role.spec) for role in config.roles.values()]
    sections = (
        ("models", _roles(config, plans)),
        *memory_sections(config, planner, device_memory),
        (f"updates in iterations 1..{SHOWN_ITERATIONS}", _updates(config)),
        ("batch", _batch(config, world_size)),
        ("data", _data(config)),
        ("conditioning", _conditioning(config)),
        ("output", [f"  {config.training.output_dir}"]),
    )
    head = f"{config.recipe.method} on {config.recipe.family}: {config.method_plugin.help}"
    return "\n".join([head, *(line for name, lines in sections for line in ("", name, *lines))])


def _roles(config: RunConfig, plans: Sequence[RolePlan]) -> list[str]:
    rows = [("role", "module", "architecture", "parameters", "", "precision", "weights")]
    for plan in plans:
        role = config.roles[plan.role]
        for module in plan.modules:
            lora = role.spec.lora
            trained = f"LoRA rank {lora.rank}, {module.adapters:,}" if lora else "trained"
            rows.append((
                plan.role, module.name, module.architecture, f"{module.parameters:,}",
                trained if role.spec.trainable else "frozen", role.spec.precision,
                plan.source if plan.present else f"{plan.source} (weights not here yet)",
            ))  # fmt: skip
    starts = [
        f"  {name} starts from {role.init_from.path}"
        + (f" ({role.init_from.role}{', EMA' if role.init_from.ema else ''})")
        for name, role in config.roles.items()
        if role.init_from is not None
    ]
    return [*table(rows, right=(3,)), *starts]


def _updates(config: RunConfig) -> list[str]:
    iterations = range(1, SHOWN_ITERATIONS + 1)
    rows = [("optimizer", *map(str, iterations), "in the whole run")]
    for name, role in config.roles.items():
        if role.optimizer is not None:
            marks = ("x" if name in config.method.turns(i) else "." for i in iterations)
            lr = f"lr {role.optimizer.lr:g}, {role.optimizer.schedule.name}"
            rows.append((f"{name} ({lr})", *marks, f"{horizon(config, name):,}"))
            for module, steps in horizons(config, name).items():
                blank = [""] * SHOWN_ITERATIONS
                rows.append((f"  of which {module}, by t", *blank, f"about {steps:,}"))
    return table(rows, right=range(1, SHOWN_ITERATIONS + 2))


def _batch(config: RunConfig, world_size: int) -> list[str]:
    training = config.training
    accumulation = training.accumulation(world_size)
    at_once = training.global_batch_size // (accumulation * world_size)
    return [
        f"  {training.global_batch_size} a step = {at_once} a device x {accumulation} micro "
        f"step(s) x {world_size} device(s); {training.max_train_steps:,} iterations"
    ]


def _data(config: RunConfig) -> list[str]:
    if not Path(config.data.path).exists():
        return [f"  not on this machine yet: {config.data.path}", "  a real run needs it"]
    facts = dataset_info(config.data.path)
    epochs = config.training.max_train_steps * config.training.global_batch_size / facts.samples
    return [
        f"  {facts.samples:,} samples in {facts.shards} shard(s), latents "
        f"{list(facts.latent_shape or ())}; the run sees each {epochs:.2f} times",
        f"  {config.data.path}",
    ]


def _conditioning(config: RunConfig) -> list[str]:
    prompt = config.conditioning.negative_prompt
    there = Path(config.data.path).exists()
    facts = dataset_info(config.data.path) if there else None
    stored = facts.negative_prompt if facts else None
    needed = config.method.needs_negative or config.conditioning.dropout > 0
    if stored is not None and prompt in (None, stored):
        source = f"in the data set's constants (prompt {stored!r})"
    elif prompt is not None:
        source = f"encoded once at set-up from {prompt!r}"
    elif needed:
        source = "needed; the data set must bring it, or conditioning.negative_prompt name one"
    else:
        source = "none, and no step needs one"
    return [
        f"  negative condition: {source}",
        f"  condition dropout: {config.conditioning.dropout:g}",
    ]
