"""The memory of a plan, as ``--dry-run`` prints it."""

from __future__ import annotations

from distill_train.memory import Planner, RunMemory
from distill_train.process_rules import group_size, strategy_of
from distill_train.schema import RunConfig
from distill_train.suggestions import fitting, suggestions
from distill_train.text import readable_bytes, table

Section = tuple[str, list[str]]


def memory_sections(
    config: RunConfig, planner: Planner, device_memory: int | None
) -> list[Section]:
    """Headings and lines."""
    memory = planner.run(config)
    sections = [
        (_heading(config, planner.world_size), _roles(memory)),
        ("fullest moment", _turns(memory)),
    ]
    if device_memory is not None:
        sections.append(_fit(config, planner, memory, device_memory))
    return sections


def _heading(config: RunConfig, world_size: int) -> str:
    distributed = config.training.distributed
    strategy = strategy_of(distributed, world_size)
    if world_size == 1:
        return "memory of the one process"
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
        held = role.device
        unknown = "unknown" if role.call is None else None
        cells = [_size(n) for n in (held.weights, held.gradients, held.optimizer, held.ema)]
        cells += [unknown or _size(role.activations), _size(role.called), _size(role.total)]
        rows.append([name, *cells, *([_size(role.host.total)] if host else [])])
    return table(rows, right=range(1, len(rows[0])))


def _turns(memory: RunMemory) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("who learns", "stays", "gradients", "activations", "largest call", "sum")
    ]
    for turn in memory.turns:
        parts = (turn.staying, turn.gradients, turn.held, turn.calling, turn.total)
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
    if peak <= size:
        return heading, [f"  fits: {readable_bytes(size - peak)} are left"]
    lines = [
        f"  does not fit: {readable_bytes(peak)} are needed, {readable_bytes(peak - size)} too many"
    ]
    found = suggestions(config, planner)
    if found:
        lines += ["  what would help, each by itself, the mildest first:"]
        width = max(len(s.line) for s in found)
        saved = [f"-{readable_bytes(s.saves)}" for s in found]
        widest = max(map(len, saved))
        lines += [
            f"    {s.line.ljust(width)}  {text.rjust(widest)}"
            for s, text in zip(found, saved, strict=True)
        ]
    return heading, [*lines, *_way_out(config, planner, size)]


def _way_out(config: RunConfig, planner: Planner, size: int) -> list[str]:
    found = fitting(config, planner, size)
    if found is None:
        return [
            "  not even all of this together is enough: plan for more processes with fsdp2, a "
            "smaller clip or a smaller model"
        ]
    host = f", {readable_bytes(found.memory.host)} in host memory" if found.memory.host else ""
    return [
        f"  the fewest lines that fit ({readable_bytes(found.memory.peak)}{host}):",
        *(f"    {line}" for line in found.lines),
    ]


def _size(count: int) -> str:
    return readable_bytes(count) if count else "-"
