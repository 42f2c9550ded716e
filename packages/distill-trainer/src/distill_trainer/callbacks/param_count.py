"""How many parameters each role has."""

from __future__ import annotations

from distill_protocols import Callback, ModelBundle, RunState


class ParamCountCallback(Callback):
    """Logs a table of parameters, all and trainable, by module; once, at the first iteration."""

    name = "param_count"

    def __init__(self) -> None:
        self._done = False

    def on_step_start(self, run: RunState) -> None:
        if self._done:
            return
        self._done = True
        if not run.trackers:
            return
        table = parameter_table(run.method.bundle)
        for tracker in run.trackers:
            tracker.log_text(run.iteration, "parameters", table)


def parameter_table(bundle: ModelBundle) -> str:
    """A Markdown table: module, parameters, of these trainable."""
    lines = ["| module | parameters | trainable |", "|---|---:|---:|"]
    for name, role in bundle.roles.items():
        for key, module in role.modules.items():
            count = sum(p.numel() for p in module.parameters())
            # By the optimizer, not by requires_grad: methods switch that off and on by turns.
            optimizer = role.optimizers.get(key)
            groups = optimizer.param_groups if optimizer else []
            moving = sum(p.numel() for group in groups for p in group["params"])
            lines.append(f"| {name}.{key} | {count:,} | {moving:,} |")
    return "\n".join(lines)
