"""What roles hold on each of two processes: in a module that forked children can import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench" / "memory_plan.py"


def load_bench() -> Any:
    """Load the benchmark's module, which measures."""
    if "memory_plan" not in sys.modules:
        spec = importlib.util.spec_from_file_location("memory_plan", BENCH)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["memory_plan"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["memory_plan"])
    return sys.modules["memory_plan"]


def planned_and_held(
    file: Path, strategies: tuple[str, ...], rank: int | None = None
) -> dict[tuple[str, str], tuple[dict[str, int], dict[str, int]]]:
    """Return planned and measured bytes on this process, by strategy and role."""
    from distill_runfile.read import read_config
    from torch import distributed

    size = distributed.get_world_size() if rank is None else 1
    rank = distributed.get_rank() if rank is None else rank
    tool, written = load_bench(), read_config(file)
    sizes = {}
    for strategy in strategies:
        config = tool.with_strategy(written, strategy)
        for role in config.roles:
            plan = tool.plan_bytes(config, role, size, rank)
            sizes[strategy, role] = (plan, tool.measure_role(config, role)[0])
    return sizes
