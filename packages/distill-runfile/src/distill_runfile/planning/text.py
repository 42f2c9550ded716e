"""The memory of a plan, as ``--dry-run`` prints it."""

from __future__ import annotations

from collections.abc import Sequence

from distill_runtime import readable_bytes

from distill_runfile.planning.memory import Planner, RunMemory
from distill_runfile.planning.placement import group_size, strategy_of
from distill_runfile.planning.suggestions import fitting, suggestions
from distill_runfile.schema import RunConfig

Section = tuple[str, list[str]]


def memory_sections(
    config: RunConfig, planner: Planner, device_memory: int | None
) -> list[Section]:
    """Describe the memory of a run as headings with lines.

    Args:
        device_memory: bytes of one device, to say whether the run fits.
    """
    memory = planner.run(config)
    sections = [
        (_heading(config, planner.world_size), _roles(memory)),
        ("peak memory", _turns(memory)),
    ]
    if device_memory is not None:
        sections.append(_fit(config, planner, memory, device_memory))
    return sections


def _heading(config: RunConfig, world_size: int) -> str:
    distributed = config.training.distributed
    strategy = strategy_of(distributed, world_size)
    if world_size == 1:
        return "memory of one process"
    if strategy == "ddp":
        return f"memory of each of {world_size} processes (ddp)"
    group = group_size(distributed, world_size)
    taken = " taken as" if strategy == "hsdp" and distributed.shard_size is None else ""
    return (
        f"memory of each of {world_size} processes ({strategy}, a sharded weight lies over{taken} "
        f"{group}; of the one that holds most)"
    )


def _roles(memory: RunMemory) -> list[str]:
    host = memory.host > 0
    head = [
        "role",
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "activations",
        "while called",
        "sum",
    ]
    rows = [[*head, *(["in host memory"] if host else [])]]
    for name, role in memory.roles.items():
        device = role.device
        unknown = "unknown" if role.call is None else None
        cells = [_size(n) for n in (device.weights, device.gradients, device.optimizer, device.ema)]
        cells += [unknown or _size(role.activations), _size(role.called), _size(role.total)]
        rows.append([name, *cells, *([_size(role.host.total)] if host else [])])
    return table(rows, right=range(1, len(rows[0])))


def _turns(memory: RunMemory) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("updated roles", "stays", "gradients", "activations", "largest call", "sum")
    ]
    for turn in memory.turns:
        parts = (turn.staying, turn.gradients, turn.kept, turn.largest_call, turn.total)
        rows.append((" + ".join(turn.roles), *map(_size, parts)))
    return [
        *table(rows, right=range(1, 6)),
        "  stays: weights, optimizer and EMA of all roles; one role is called at a time.",
        "  Activations are estimated, without torch.compile; the device's context and the",
        "  allocator's slack come on top.",
    ]


def _fit(config: RunConfig, planner: Planner, memory: RunMemory, size: int) -> Section:
    heading = f"on a device of {readable_bytes(size)}"
    peak = memory.peak
    unknown = [name for name, role in memory.roles.items() if role.call is None]
    if peak <= size and unknown:
        return heading, [
            f"  weights fit, {readable_bytes(size - peak)} are left; activations unknown: family "
            f"{config.recipe.family!r} cannot estimate them for {', '.join(unknown)}"
        ]
    if peak <= size:
        return heading, [f"  fits: {readable_bytes(size - peak)} are left"]
    lines = [
        f"  does not fit: {readable_bytes(peak)} are needed, {readable_bytes(peak - size)} too many"
    ]
    helpful = suggestions(config, planner)
    if helpful:
        lines += ["  what would help, each by itself, the mildest first:"]
        width = max(len(s.line) for s in helpful)
        saved = [f"-{readable_bytes(s.saves)}" for s in helpful]
        widest = max(map(len, saved))
        lines += [
            f"    {s.line.ljust(width)}  {text.rjust(widest)}"
            for s, text in zip(helpful, saved, strict=True)
        ]
    return heading, [*lines, *_fewest_lines(config, planner, size)]


def _fewest_lines(config: RunConfig, planner: Planner, size: int) -> list[str]:
    enough = fitting(config, planner, size)
    if enough is None:
        return [
            "  not even all of this together is enough: plan for more processes with fsdp2, a "
            "smaller clip or a smaller model"
        ]
    host = f", {readable_bytes(enough.memory.host)} in host memory" if enough.memory.host else ""
    return [
        f"  the fewest lines that fit ({readable_bytes(enough.memory.peak)}{host}):",
        *(f"    {line}" for line in enough.lines),
    ]


def _size(count: int) -> str:
    return readable_bytes(count) if count else "-"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Align ``rows`` as lines; the first row is the head; columns in ``right`` align right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]
