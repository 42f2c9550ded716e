"""The numbers of the README: tuned teacher baselines, and students over seeds and step counts.

    uv run python tools/tiny_study.py baselines                  # teacher: shift x guidance x steps
    uv run python tools/tiny_study.py students --seeds 0 1 2 --steps 2
    uv run python tools/tiny_study.py table                      # markdown, from what was measured

Every number comes from a `report.json` that the app wrote: this tool only writes run files, starts
the app and reads its reports, all under outputs/study/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from distill_train.source import read_source

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny"
STUDY = ROOT / "outputs" / "study"
SHIFTS = (1.0, 2.0, 3.0, 5.0, 8.0)
GUIDANCES = (1.0, 1.5, 2.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("baselines").add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 32]
    )
    students = commands.add_parser("students")
    students.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    students.add_argument("--steps", type=int, default=2)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "baselines":
        for steps in args.steps:
            run(f"teacher_{steps}", baseline_run(steps))
    elif args.command == "students":
        for seed in args.seeds:
            run(f"student_{args.steps}_seed{seed}", student_run(args.steps, seed))
    else:
        print(table())


def shipped() -> dict[str, Any]:
    """dmd2.yaml with absolute paths."""
    values = read_source(TINY / "dmd2.yaml").values
    for role in values["models"].values():
        role["path"] = str(TINY / "wan")
    values["data"]["path"] = str(TINY / "data")
    report = values["callbacks"]["report"]
    report |= {"judge": str(TINY / "judge"), "prompts": str(TINY / "judge" / "prompts.txt")}
    values.pop("validation", None)
    return values


def baseline_run(steps: int) -> dict[str, Any]:
    """One training step (there is no run without), then the teacher over the whole grid."""
    values = shipped()
    values["training"]["max_train_steps"] = 1
    values["method_config"]["generator_update_interval"] = 1  # or the student has no turn in it
    shifts = SHIFTS if steps > 1 else (1.0,)  # one step starts at t = 1000, whatever the shift
    values["callbacks"]["report"]["entries"] = {
        f"shift {shift:g}, w {w:g}": {
            "role": "teacher",
            "sheet": False,
            "sampler": {"steps": steps, "shift": shift, "guidance": w},
        }
        for shift in shifts
        for w in GUIDANCES
    }
    values["checkpoint"] = {"save_at_end": False}
    return values


def student_run(steps: int, seed: int) -> dict[str, Any]:
    values = shipped()
    values["training"]["seed"] = seed
    if steps != 2:
        sampler = {"steps": steps, "shift": 3.0, "stochastic": True}
        values["method_config"]["student_sampler"] = sampler
    values["callbacks"]["report"]["entries"] = {
        "ema": {"role": "student", "ema": True},
        "live": {"role": "student"},
    }
    return values


def run(name: str, values: dict[str, Any]) -> None:
    folder = STUDY / name
    if (folder / "report.json").exists():
        print(f"{name}: measured already ({folder})")
        return
    folder.mkdir(parents=True, exist_ok=True)
    values["training"]["output_dir"] = str(folder)
    file = STUDY / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    print(f"{name} ...", flush=True)
    subprocess.run(
        [sys.executable, str(ROOT / "apps" / "train"), "--config", str(file)], check=True
    )


def entries(name: str) -> list[dict[str, Any]]:
    return json.loads((STUDY / name / "report.json").read_text())["entries"]


def table() -> str:
    """Teacher at its best setting a step count, students as mean (min to max) over seeds."""
    lines = [
        "| sampled by | FD | digit | direction | variance in a caption | model calls |",
        "|---|---|---|---|---|---|",
    ]
    for steps in (32, 4, 2, 1):
        if (STUDY / f"teacher_{steps}" / "report.json").exists():
            best = min(entries(f"teacher_{steps}"), key=lambda e: e["frechet_distance"])
            lines.append(
                row(
                    f"teacher, {steps} step{'s' * (steps > 1)}, best of the grid ({best['name']})",
                    [best],
                )
            )
    for steps in (4, 2, 1):
        seeds = sorted(STUDY.glob(f"student_{steps}_seed*/report.json"))
        for weights in ("live", "ema"):
            found = [e for s in seeds for e in entries(s.parent.name) if e["weights"] == weights]
            if found:
                label = (
                    f"**student, {steps} step{'s' * (steps > 1)}**, {weights}, {len(found)} seeds"
                )
                lines.append(row(label, found))
    return "\n".join(lines)


def row(label: str, found: list[dict[str, Any]]) -> str:
    def cell(values: list[float], digits: int) -> str:
        mean = f"{statistics.mean(values):.{digits}f}"
        if len(values) == 1:
            return mean
        return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    columns = [
        cell([e["frechet_distance"] for e in found], 1),
        cell([e["accuracy"]["digit"] for e in found], 2),
        cell([e["accuracy"]["direction"] for e in found], 2),
        cell([e["within_caption_variance"] for e in found], 3),
        str(found[0]["model_calls_per_clip"]),
    ]
    return f"| {label} | {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
