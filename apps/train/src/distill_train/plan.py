"""What a run would be, without weights: the text of ``--dry-run``.

Walks the road of a real run up to the meta device, so it needs torch and diffusers, but neither
weights nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from distill_conditioning.facts import dataset_facts
from distill_protocols.bundle import DTYPES, RolePlan

from distill_train.schema import RunConfig

SHOWN_ITERATIONS = 10
_MOMENTS = {"adamw": 2, "sgd": 0}
"""Tensors of a parameter's size that an optimizer keeps."""


@frozen(kw_only=True)
class RoleMemory:
    """Bytes of one role on one device, activations left out."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


def role_memory(config: RunConfig, plan: RolePlan) -> RoleMemory:
    """What trains is in fp32, with its gradients and moments; the rest in the role's precision."""
    role = config.roles[plan.role]
    moving = plan.parameters if role.spec.lora is None else plan.adapters
    trained = 0 if role.optimizer is None else moving
    moments = 0 if role.optimizer is None else _MOMENTS[role.optimizer.name]
    # Adapters are in fp32 in a frozen role, too.
    wide = trained or plan.adapters
    fixed = plan.parameters + plan.adapters - wide
    return RoleMemory(
        weights=4 * wide + fixed * DTYPES[role.spec.precision].itemsize,
        gradients=4 * trained,
        optimizer=4 * trained * moments,
        ema=4 * trained if plan.role in averaged_roles(config) else 0,
    )


def averaged_roles(config: RunConfig) -> set[str]:
    """Roles of which a callback keeps an average."""
    return {
        role
        for name, callback in config.callbacks.items()
        for role in config.callback_plugins[name].averages(callback)
    }


def horizon(config: RunConfig, role: str) -> int:
    """How often ``role``'s optimizers step in the whole run: the length of their schedules."""
    updates = config.method_plugin.updates
    steps = range(1, config.training.max_train_steps + 1)
    return sum(role in updates(config.method, iteration) for iteration in steps)


def describe(config: RunConfig) -> str:
    """The resolved plan as text."""
    plans = [config.family_plugin.plan(r.spec, config.pipeline) for r in config.roles.values()]
    sections = (
        ("models", _roles(config, plans)),
        ("memory (one device, activations not counted)", _memory(config, plans)),
        (f"updates in iterations 1..{SHOWN_ITERATIONS}", _updates(config)),
        ("batch", _batch(config)),
        ("data", _data(config)),
        ("conditioning", _conditioning(config)),
        ("output", [f"  {config.training.output_dir}"]),
    )
    head = f"{config.recipe.method} on {config.recipe.family}: {config.method_plugin.help}"
    return "\n".join([head, *(line for name, lines in sections for line in ("", name, *lines))])


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """``rows`` as aligned lines; the first row is the head; columns in ``right`` align right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def readable_bytes(count: int) -> str:
    """``4.3 GB`` (powers of ten)."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    digits = 0 if size >= 100 or units[0] == "B" else 1
    return f"{size:.{digits}f} {units[0]}"


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


def _memory(config: RunConfig, plans: Sequence[RolePlan]) -> list[str]:
    rows: list[tuple[str, ...]] = [("role", "weights", "gradients", "optimizer", "EMA", "together")]
    memories = [(plan.role, role_memory(config, plan)) for plan in plans]
    for name, m in memories:
        parts = (m.weights, m.gradients, m.optimizer, m.ema, m.total)
        rows.append((name, *(readable_bytes(part) if part else "-" for part in parts)))
    rows.append(("all", "", "", "", "", readable_bytes(sum(m.total for _, m in memories))))
    return table(rows, right=(1, 2, 3, 4, 5))


def _updates(config: RunConfig) -> list[str]:
    iterations = range(1, SHOWN_ITERATIONS + 1)
    rows = [("optimizer", *map(str, iterations), "in the whole run")]
    for name, role in config.roles.items():
        if role.optimizer is not None:
            marks = (
                "x" if name in config.method_plugin.updates(config.method, i) else "."
                for i in iterations
            )
            lr = f"lr {role.optimizer.lr:g}, {role.optimizer.schedule.name}"
            rows.append((f"{name} ({lr})", *marks, f"{horizon(config, name):,}"))
    return table(rows, right=range(1, SHOWN_ITERATIONS + 2))


def _batch(config: RunConfig) -> list[str]:
    training = config.training
    accumulation = training.accumulation()
    micro = training.global_batch_size // accumulation
    return [
        f"  {training.global_batch_size} a step = {micro} a micro step x {accumulation} micro "
        f"step(s) x 1 device; {training.max_train_steps:,} iterations"
    ]


def _data(config: RunConfig) -> list[str]:
    if not Path(config.data.path).exists():
        return [f"  not on this machine yet: {config.data.path}", "  a real run needs it"]
    facts = dataset_facts(config.data.path)
    epochs = config.training.max_train_steps * config.training.global_batch_size / facts.samples
    return [
        f"  {facts.samples:,} samples in {facts.shards} shard(s), latents "
        f"{list(facts.latent_shape or ())}; the run sees each {epochs:.2f} times",
        f"  {config.data.path}",
    ]


def _conditioning(config: RunConfig) -> list[str]:
    prompt = config.conditioning.negative_prompt
    there = Path(config.data.path).exists()
    facts = dataset_facts(config.data.path) if there else None
    stored = facts.negative_prompt if facts else None
    needed = config.method_plugin.needs_negative(config.method) or config.conditioning.dropout > 0
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
