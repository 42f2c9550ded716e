"""What a run would be, without weights: the text of ``--dry-run``.

It goes as far as a real run does before weights are read, so it needs torch and the family's
libraries, but neither weights nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from distill_checkpoint import preview_resume
from distill_conditioning import data_info
from distill_conditioning.buckets import Bucket, count_held_out, make_buckets
from distill_protocols import EXIT_EMBEDDING, RolePlan, RoleSpec
from distill_runtime import counted

from distill_runfile.missing import missing_data
from distill_runfile.planning.memory import Planner
from distill_runfile.planning.text import memory_sections, table
from distill_runfile.schema import RunConfig
from distill_runfile.structure import to_plain

SHOWN_ITERATIONS = 10


def horizon(config: RunConfig, role: str, *, after: int = 0) -> int:
    """Count the steps of ``role``'s optimizers: the length of their schedules.

    Args:
        after: iteration of the run after which they start.
    """
    steps = range(after + 1, config.training.max_train_steps + 1)
    return sum(role in config.method.turns(iteration) for iteration in steps)


def horizons(config: RunConfig, role: str, *, after: int = 0) -> dict[str, int]:
    """Estimate the steps of each expert of a role, by module; empty for a role without experts.

    The share is what the method expects: which expert is trained is drawn, so an expert's own
    count differs from it by about the square root of the count, and a schedule that falls has
    fallen by then or stays that near its end.
    """
    ranges = config.family_plugin.expert_ranges(config.roles[role].spec, config.pipeline)
    steps = horizon(config, role, after=after)
    shares = {m: config.method.update_share(role, low, high) for m, (low, high) in ranges.items()}
    if len(shares) == 1:  # one expert of several, which takes all steps
        shares = dict.fromkeys(shares, 1.0)
    if shares and config.roles[role].spec.exits is not None:
        shares[EXIT_EMBEDDING] = 1.0  # whichever expert is called
    return {module: max(1, round(steps * share)) for module, share in shares.items()}


@frozen(kw_only=True)
class RunPlan:
    """What a run would be.

    Attributes:
        text: to be read.
        needs: what the run needs and this machine does not have yet.
    """

    text: str
    needs: tuple[str, ...]


def describe(config: RunConfig, *, world_size: int = 1, device_memory: int | None = None) -> str:
    """Describe the resolved plan as text (``plan_run``)."""
    return plan_run(config, world_size=world_size, device_memory=device_memory).text


def plan_run(
    config: RunConfig, *, world_size: int = 1, device_memory: int | None = None
) -> RunPlan:
    """Plan a run.

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
        *([("callbacks", lines)] if (lines := _callbacks(config)) else []),
        ("output", [f"  {config.training.output_dir}", *_exports(config), *_resume(config)]),
        *([("notes", [f"  {note}" for note in config.notes])] if config.notes else []),
    )
    head = f"{config.recipe.method} on {config.recipe.family}: {config.method_plugin.help}"
    text = "\n".join([head, *(line for name, lines in sections for line in ("", name, *lines))])
    absent = dict.fromkeys(plan.source for plan in plans if not plan.present)
    return RunPlan(text=text, needs=(*config.missing, *(f"the weights of {s}" for s in absent)))


def export_warnings(config: RunConfig) -> list[str]:
    """Say of each export where its readers will not do what the run does."""
    warnings = []
    for export in config.checkpoint.export:
        role, sampler = config.roles[export.role].spec, config.method.student_sampler
        if sampler is None:
            continue
        found = config.family_plugin.export_warnings(
            role, config.pipeline, export.request(sampler), source=config.source
        )
        warnings += [f"export {export.folder}: {text}" for text in found]
    return warnings


def _exports(config: RunConfig) -> list[str]:
    lines = []
    for export in config.checkpoint.export:
        weights = "averaged" if export.ema else "live"
        lines.append(
            f"  {export.folder}: {export.role} ({weights} weights) as {export.format}, at the end"
        )
        role = config.roles[export.role].spec
        if export.format == "lora" and role.lora is None:
            lines += [
                f"    {module} is never trained, so it is left out"
                for module in _untrained(config, export.role)
            ]
    return [*lines, *(f"  warning: {text}" for text in export_warnings(config))]


def _untrained(config: RunConfig, role: str) -> list[str]:
    """Name the experts of ``role`` whose noise levels the method never trains at."""
    ranges = config.family_plugin.expert_ranges(config.roles[role].spec, config.pipeline)
    return [
        module
        for module, (low, high) in ranges.items()
        if config.method.update_share(role, low, high) == 0
    ]


def _roles(config: RunConfig, plans: Sequence[RolePlan]) -> list[str]:
    rows = [("role", "module", "architecture", "parameters", "", "precision", "weights")]
    for plan in plans:
        role = config.roles[plan.role]
        for module in plan.modules:
            lora = role.spec.lora
            trained = "trained"  # of a LoRA role: what stands beside its transformers
            if lora and module.adapters:
                trained = f"LoRA rank {lora.rank}, {module.adapters:,}"
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
    options = [
        f"  {name}: {', '.join(_options(role.spec))}"
        for name, role in config.roles.items()
        if _options(role.spec)
    ]
    return [*table(rows, right=(3,)), *options, *starts]


def _options(spec: RoleSpec) -> list[str]:
    """Options of a role as a run file writes them, without those that the table of roles shows."""
    shown = ("lora", "heads")
    return [
        f"{option}: {_inline(getattr(spec, option))}"
        for option in spec.options_set()
        if option not in shown
    ]


def _inline(value: object) -> str:
    """Return a value on one line, in YAML's flow style; keys that are not set are left out."""
    plain = to_plain(value)
    if isinstance(plain, dict):
        pairs = (f"{key}: {_inline(item)}" for key, item in plain.items() if item is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(plain, list | tuple):
        return "[" + ", ".join(map(_inline, plain)) + "]"
    return str(plain).lower() if isinstance(plain, bool) else str(plain)


def _updates(config: RunConfig) -> list[str]:
    iterations = range(1, SHOWN_ITERATIONS + 1)
    rows = [("optimizer", *map(str, iterations), "in the whole run")]
    for name, role in config.roles.items():
        if role.optimizer is not None:
            marks = ("x" if name in config.method.turns(i) else "." for i in iterations)
            lr = f"lr {role.optimizer.lr:g}, {role.optimizer.schedule.name}"
            rows.append((f"{name} ({lr})", *marks, f"{horizon(config, name):,}"))
            experts = horizons(config, name)
            experts.pop(EXIT_EMBEDDING, None)
            for module, steps in experts.items() if len(experts) > 1 else ():
                blank = [""] * SHOWN_ITERATIONS
                rows.append((f"  of which {module}, by t", *blank, f"about {steps:,}"))
    return table(rows, right=range(1, SHOWN_ITERATIONS + 2))


def _batch(config: RunConfig, world_size: int) -> list[str]:
    training = config.training
    accumulation = training.accumulation(world_size)
    at_once = training.global_batch_size // (accumulation * world_size)
    return [
        f"  {training.global_batch_size} a step = {at_once} a device x "
        f"{counted(accumulation, 'micro step')} x {counted(world_size, 'device')}; "
        f"{training.max_train_steps:,} iterations"
    ]


def _data(config: RunConfig) -> list[str]:
    absent = missing_data(config.data)
    if absent:
        lines = [f"  not on this machine yet: {path}" for path in absent]
        return [*lines, "  a real run needs it" if len(absent) == 1 else "  a real run needs them"]
    info = data_info(config.data)
    seen = config.training.max_train_steps * config.training.global_batch_size
    shards = sum(one.shards for one in info.sets)
    buckets = make_buckets(info.sources)
    shapes = {bucket.shape.latents for bucket in buckets}
    text = f"latents of {len(shapes)} shapes"
    if len(shapes) == 1:
        [latents] = shapes
        text = "captions alone" if latents is None else f"latents {list(latents)}"
    share = (config.validation.share if config.validation else None) or 0.0
    held_out = sum(count_held_out(len(bucket), share) for bucket in buckets)
    lines = [
        f"  {info.samples:,} samples in {counted(shards, 'shard')}, {text}; the run sees each "
        f"{seen / (info.samples - held_out):.2f} times"
    ]
    if held_out:
        lines.append(f"  {held_out:,} of them are held out, and losses are measured on those")
    if config.data.path is not None:
        lines.append(f"  {config.data.path}")
    if len(buckets) > 1:
        lines += _buckets(buckets, seen)
    return lines


def _buckets(buckets: Sequence[Bucket], seen: int) -> list[str]:
    """Say how often the samples of each bucket are seen."""
    rows = [("data set", "latents", "samples", "share", "times seen")]
    for bucket in buckets:
        latents = "none" if bucket.shape.latents is None else str(list(bucket.shape.latents))
        share = float(bucket.share)
        rows.append((
            bucket.key[0] if bucket.key else "", latents, f"{len(bucket):,}", f"{share:.1%}",
            f"{seen * share / len(bucket):.2f}",
        ))  # fmt: skip
    return table(rows, right=(2, 3, 4))


def _resume(config: RunConfig) -> list[str]:
    output_dir = Path(config.training.output_dir)
    preview = preview_resume(config.checkpoint, output_dir, config.resolved)
    if preview is None:
        return []
    return [f"  goes on from {preview.folder}", *(f"    {note}" for note in preview.notes)]


def _callbacks(config: RunConfig) -> list[str]:
    by_default = "on by default; callbacks: {{{}: null}} turns it off"
    rows = []
    for name in config.callbacks:
        plugin = config.callback_plugins[name]
        note = f" ({by_default.format(name)})" if plugin.on_by_default else ""
        rows.append((name, f"{plugin.help}{note}"))
    rows += [(name, "off") for name in config.callbacks_off]
    return table(rows) if rows else []


def _conditioning(config: RunConfig) -> list[str]:
    prompt = config.conditioning.negative_prompt
    stored = () if missing_data(config.data) else data_info(config.data).negative_prompts
    needed = config.guides_by_two_calls or config.conditioning.drops
    if stored and (prompt is None or prompt in stored):
        source = f"in the data set's constants (prompt {prompt or stored[0]!r})"
    elif prompt is not None:
        source = f"encoded once at set-up from {prompt!r}"
    elif needed:
        source = "needed; the data set must bring it, or conditioning.negative_prompt name one"
    else:
        source = "none, and no step needs one"
    if more := len(config.conditioning.more_negative_prompts):
        source += f"; training draws one of it and {more} more for each sample"
    return [
        f"  negative condition: {source}",
        f"  condition dropout: {_inline(config.conditioning.dropout)}",
    ]
