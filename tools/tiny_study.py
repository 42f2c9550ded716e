"""The numbers of the README: tuned teacher baselines, and students over seeds and step counts.

    uv run python tools/tiny_study.py baselines   # teacher: solver x steps x shift x guidance
    uv run python tools/tiny_study.py students --seeds 0 1 2 --steps 2
    uv run python tools/tiny_study.py exits --seeds 0 1 2        # a critic that knows the exit
    uv run python tools/tiny_study.py experts --seeds 0 1 2      # two-expert teacher and students
    uv run python tools/tiny_study.py phased --seeds 0 1 2       # Phased DMD, its parts alone
    uv run python tools/tiny_study.py causal --seeds 0 1 2       # KD, then Self-Forcing
    uv run python tools/tiny_study.py gan --seeds 0 1 2          # DMD2 with a discriminator
    uv run python tools/tiny_study.py table                      # markdown, from what was measured

Every number comes from a `report.json` that the app wrote: this tool only writes run files, starts
the app and reads its reports, all under outputs/study/ (or the folder that STUDY names).

A teacher's best setting is that with the least Frechet distance by the judge. Beside it stand
numbers that nothing was chosen by (`distill_evaluation.distances`): distances in pixels with their
temporal differences and in latents, and the latents' standard deviation relative to real ones; all
against 1,600 clips of the data set. The row "real, other clips" is what 400 other ones come to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from distill_runfile.source import read_source
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny"
STUDY = Path(os.environ.get("STUDY", ROOT / "outputs" / "study"))
SOLVERS = ("euler", "unipc")
SHIFTS = (1.0, 2.0, 3.0, 5.0, 8.0)
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
REAL_CLIPS = 2000
"""Of them as many as an entry samples (400) are kept out and measured, as all others are."""
DISTANCES = ("pixels", "latents", "latent_std")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    baselines = commands.add_parser("baselines")
    baselines.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    baselines.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    baselines.add_argument("--shifts", type=float, nargs="+", default=SHIFTS)
    baselines.add_argument("--guidances", type=float, nargs="+", default=GUIDANCES)
    students = commands.add_parser("students")
    students.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    students.add_argument("--steps", type=int, default=2)
    exits = commands.add_parser("exits")
    exits.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    exits.add_argument("--steps", type=int, default=2)
    experts = commands.add_parser("experts")
    experts.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    phased = commands.add_parser("phased")
    phased.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    phased.add_argument("--variants", nargs="+", choices=PHASED, default=list(PHASED))
    for name in ("causal", "gan"):
        commands.add_parser(name).add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "baselines":
        for solver in args.solvers:
            for steps in args.steps:
                grid = [(shift, w) for shift in args.shifts for w in args.guidances]
                run(baseline_name(steps, solver), baseline_run(steps, solver, grid))
    elif args.command == "students":
        for seed in args.seeds:
            run(f"student_{args.steps}_seed{seed}", student_run(args.steps, seed))
    elif args.command == "exits":
        for seed in args.seeds:
            run(f"exits_{args.steps}_seed{seed}", exits_run(args.steps, seed))
            run(f"exits_w_{args.steps}_seed{seed}", exits_run(args.steps, seed, by_exit=True))
    elif args.command == "experts":
        run("experts_teacher", expert_teacher_run(two_experts()))
        run("experts_teacher_4", expert_baseline_run())
        for seed in args.seeds:
            run(f"experts_student_4_seed{seed}", expert_student_run(seed))
    elif args.command == "phased":
        run("experts_teacher", expert_teacher_run(two_experts()))
        for seed in args.seeds:
            run(f"experts_student_4_seed{seed}", expert_student_run(seed))
            for name in args.variants:
                run(f"experts_{name}_4_seed{seed}", phased_run(seed, name))
    elif args.command == "causal":
        make_trajectories()
        for seed in args.seeds:
            run(f"kd_causal_seed{seed}", kd_run(seed))
            run(f"self_forcing_seed{seed}", self_forcing_run(seed))
    elif args.command == "gan":
        for seed in args.seeds:
            run(f"gan_2_seed{seed}", gan_run(seed))
    else:
        print(table())


def read_shipped(name: str = "dmd2") -> dict[str, Any]:
    """Read a run file of configs/tiny with absolute paths and its student alone in the report."""
    values = read_source(TINY / f"{name}.yaml").values
    for role in values["models"].values():
        if "path" in role:
            role["path"] = str(TINY / "wan")
    values["data"]["path"] = str((TINY / values["data"]["path"]).resolve())
    report = values["callbacks"]["report"]
    report |= {
        "judge": str(TINY / "judge"),
        "prompts": str(TINY / "judge" / "prompts.txt"),
        "entries": {"ema": {"role": "student", "ema": True}, "live": {"role": "student"}},
    }
    values.pop("validation", None)
    return values


def baseline_name(steps: int, solver: str) -> str:
    """Name the run; Euler's is the one of studies before there were other solvers."""
    return f"teacher_{steps}" + f"_{solver}" * (solver != "euler")


def baseline_run(
    steps: int, solver: str = "euler", grid: Sequence[tuple[float, float]] | None = None
) -> dict[str, Any]:
    """Train one step (a run needs one), then report the teacher over a grid of (shift, w)."""
    values = read_shipped()
    values["training"]["max_train_steps"] = 1
    values["method_config"]["generator_update_interval"] = 1  # or the student has no turn in it
    grid = grid or [(shift, w) for shift in SHIFTS for w in GUIDANCES]
    if steps == 1:  # it starts at t = 1000, whatever the shift
        grid = [(1.0, w) for w in dict.fromkeys(w for _, w in grid)]
    values["callbacks"]["report"]["entries"] = {
        f"shift {shift:g}, w {w:g}": {
            "role": "teacher",
            "sheet": False,
            "sampler": {"steps": steps, "shift": shift, "guidance": w, "solver": solver},
        }
        for shift, w in grid
    }
    values["checkpoint"] = {"save_at_end": False}
    return values


def student_run(steps: int, seed: int) -> dict[str, Any]:
    values = read_shipped()
    values["training"]["seed"] = seed
    if steps != 2:
        sampler = {"steps": steps, "shift": 3.0, "stochastic": True}
        values["method_config"]["student_sampler"] = sampler
    return values


def exits_run(steps: int, seed: int, *, by_exit: bool = False) -> dict[str, Any]:
    """student_run with a critic that is told the exit.

    Args:
        by_exit: the teacher's guidance falls from 1.5 at the first exit step to 1.25 at the last.
    """
    values = student_run(steps, seed)
    values["method_config"]["critic_exits"] = True
    if by_exit:
        scales = [1.5 - 0.25 * k / (steps - 1) for k in range(steps)]
        values["method_config"]["real_score_guidance_scale"] = scales
    return values


def gan_run(seed: int) -> dict[str, Any]:
    """dmd2.yaml with the discriminator of dmd2_gan.yaml: what differs is the GAN alone."""
    values, other = student_run(2, seed), read_source(TINY / "dmd2_gan.yaml").values
    values["models"]["discriminator"] = other["models"]["discriminator"]
    values["method_config"]["gan"] = other["method_config"]["gan"]
    return values


# -- causal students ---


def make_trajectories() -> None:
    """Make the trajectories that KD trains on, once for all seeds."""
    file = TINY / "trajectories.yaml"
    command = [sys.executable, str(ROOT / "apps" / "trajectories"), "--config", str(file)]
    subprocess.run(command, check=True)


def kd_run(seed: int) -> dict[str, Any]:
    values = read_shipped("kd_causal")
    values["training"]["seed"] = seed
    return values


def self_forcing_run(seed: int) -> dict[str, Any]:
    """Train with Self-Forcing from the KD student of the same seed."""
    values = read_shipped("self_forcing")
    values["training"]["seed"] = seed
    values["models"]["student"]["init_from"] = {
        "path": str(STUDY / f"kd_causal_seed{seed}" / "student")
    }
    return values


# -- two experts ---

BOUNDARY = 0.8
"""Of the steps that the sampler below takes, two are on either side."""

EXPERT_STEPS = {"steps": 4, "shift": 3.0}


def two_experts() -> Path:
    """Write the shipped pipeline with its transformer twice."""
    folder = STUDY / "two-experts"
    if not folder.exists():
        part = folder.with_name("two-experts.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(TINY / "wan", part)
        shutil.copytree(part / "transformer", part / "transformer_2")
        index = json.loads((part / "model_index.json").read_text())
        index |= {"transformer_2": index["transformer"], "boundary_ratio": BOUNDARY}
        (part / "model_index.json").write_text(json.dumps(index, indent=2))
        part.rename(folder)
    return folder


def expert_teacher_run(path: Path) -> dict[str, Any]:
    """Train each expert on its own side of the boundary, from the shipped teacher on."""
    values = read_source(TINY / "finetune.yaml").values
    values["models"]["student"]["path"] = str(path)
    values["data"]["path"] = str(TINY / "data")
    values["training"]["max_train_steps"] = 2000
    values["training"]["optimizer"]["lr"] = 1.0e-3
    values["callbacks"]["report"] = measured({"teacher_32": {"role": "student", "ema": True}})
    values["checkpoint"] = {"export": values["checkpoint"]["export"]}
    return values


def measured(entries: dict[str, Any]) -> dict[str, Any]:
    report = dict(read_shipped()["callbacks"]["report"])
    return report | {"entries": entries}


def of_experts(values: dict[str, Any]) -> dict[str, Any]:
    for role in values["models"].values():
        role["path"] = str(STUDY / "experts_teacher" / "student")
    return values


def expert_baseline_run() -> dict[str, Any]:
    return of_experts(baseline_run(4))


def expert_student_run(seed: int) -> dict[str, Any]:
    values = of_experts(student_run(4, seed))
    values["method_config"]["student_sampler"] = EXPERT_STEPS | {"stochastic": True}
    values["training"]["max_train_steps"] = 1000  # 250 updates, about 125 an expert
    return values


ANCHOR = {"teacher_steps": 8, "anchor_step": 2, "shift": 3.0}
PHASED: dict[str, dict[str, Any]] = {
    "phased": {"anchor": ANCHOR, "exit": [0, 2, 1, 1]},
    "phased_sde": {"anchor": ANCHOR, "exit": [0, 2, 1, 1], "stochastic": True},
    "phased_plain": {},
    "phased_ida": {"anchor": ANCHOR, "exit": [0, 2, 1, 1], "critic_interpolation": 0.03},
    "anchor": {"anchor": ANCHOR, "exit": [0, 2, 1, 1], "stochastic": True},
}
"""Options beside those of ``expert_student_run``; "anchor" is DMD2, all others are Phased DMD."""


def phased_run(seed: int, name: str) -> dict[str, Any]:
    """expert_student_run by phases, or with an anchor: as many iterations of as many clips.

    The phases are trained equally often: with an anchor one high step of two is an exit.
    """
    values, options = expert_student_run(seed), dict(PHASED[name])
    stochastic = options.pop("stochastic", False)
    values["method_config"] |= options
    values["method_config"]["student_sampler"] = EXPERT_STEPS | {"stochastic": stochastic}
    if name != "anchor":
        values["recipe"]["method"] = "phased_dmd"
        del values["method_config"]["rollout"]
    return values


# -- runs and tables ---


def run(name: str, values: dict[str, Any]) -> None:
    folder = STUDY / name
    if (folder / "report.json").exists():
        print(f"{name}: measured already ({folder})")
        return
    folder.mkdir(parents=True, exist_ok=True)
    values["training"]["output_dir"] = str(folder)
    values["callbacks"]["report"]["real_latents"] = str(real_latents())
    file = STUDY / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    print(f"{name} ...", flush=True)
    subprocess.run(
        [sys.executable, str(ROOT / "apps" / "train"), "--config", str(file)], check=True
    )


def real_latents() -> Path:
    """Some clips of the data set, for the distances that nobody tuned by: once."""
    file = STUDY / "real_latents.safetensors"
    if not file.exists():
        (shard,) = TINY.glob("data/shard-*.safetensors")
        with safe_open(shard, "pt") as data:
            latents = data.get_slice("latents")
            chosen = torch.randperm(
                latents.get_shape()[0], generator=torch.Generator().manual_seed(0)
            )
            picked = latents[:][chosen[:REAL_CLIPS]].contiguous()
        part = file.with_suffix(".part")
        save_file({"latents": picked}, part)
        part.rename(file)
    return file


def entries(name: str) -> list[dict[str, Any]]:
    return json.loads((STUDY / name / "report.json").read_text())["entries"]


def table() -> str:
    """Teacher at its best setting a step count, students as mean (min to max) over seeds.

    A teacher's best is by the judge; in brackets is the least distance of any of its settings.
    """
    lines = [
        "| sampled by | FD | pixels | latents | latent std | digit | direction "
        "| variance in a caption | model calls |",
        "|---|---|---|---|---|---|---|---|---|",
        *real_row(),
    ]
    for steps in (32, 8, 4, 2, 1):
        for solver in SOLVERS:
            name = baseline_name(steps, solver)
            if (STUDY / name / "report.json").exists():
                grid = entries(name)
                best = min(grid, key=lambda e: e["frechet_distance"])
                label = f"teacher, {steps} step{'s' * (steps > 1)} of {solver}"
                lines.append(row(f"{label} ({best['name']})", [best], grid))
    for steps in (4, 2, 1):
        lines += seed_rows(f"student, {steps} step{'s' * (steps > 1)}", f"student_{steps}_seed*")
    for steps in (4, 2):
        label = f"{steps} steps, a critic that knows the exit"
        lines += seed_rows(f"student, {label}", f"exits_{steps}_seed*")
        lines += seed_rows(f"student, {label}, w by exit", f"exits_w_{steps}_seed*")
    lines += seed_rows("DMD2 with a GAN, 2 steps", "gan_2_seed*")
    lines += seed_rows("KD alone, causal, 2 steps", "kd_causal_seed*")
    lines += seed_rows("KD, then Self-Forcing, causal, 2 steps", "self_forcing_seed*")
    lines += expert_rows()
    return "\n".join(lines)


def real_row() -> list[str]:
    """Measure as many real clips as an entry has: a lower bound for any student."""
    for file in sorted(STUDY.glob("*/report.json")):
        real = json.loads(file.read_text()).get("real")
        if real is not None:
            numbers = [f"{real[name]:.2f}" for name in DISTANCES]
            return [f"| real, other clips | | {' | '.join(numbers)} | | | | |"]
    return []


def expert_rows() -> list[str]:
    lines = []
    if (STUDY / "experts_teacher" / "report.json").exists():
        lines.append(row("two-expert teacher, 32 steps", entries("experts_teacher")))
    if (STUDY / "experts_teacher_4" / "report.json").exists():
        best = min(entries("experts_teacher_4"), key=lambda e: e["frechet_distance"])
        lines.append(row(f"two-expert teacher, 4 steps, best of the grid ({best['name']})", [best]))
    lines += seed_rows("two-expert student, 4 steps", "experts_student_4_seed*")
    for name in PHASED:
        lines += seed_rows(f"two-expert student, 4 steps, {name}", f"experts_{name}_4_seed*")
    return lines


def seed_rows(label: str, pattern: str) -> list[str]:
    """Live and averaged weights over the seeds that were measured."""
    lines = []
    seeds = sorted(STUDY.glob(f"{pattern}/report.json"))
    for weights in ("live", "ema"):
        found = [e for s in seeds for e in entries(s.parent.name) if e["weights"] == weights]
        if found:
            lines.append(row(f"**{label}**, {weights}, {len(found)} seeds", found))
    return lines


def row(label: str, measured: list[dict[str, Any]], grid: Sequence[dict[str, Any]] = ()) -> str:
    """One row of the table.

    Args:
        grid: other settings; the least pixel and latent distances among them are in brackets.
    """

    def cell(values: list[float], digits: int) -> str:
        mean = f"{statistics.mean(values):.{digits}f}"
        if len(values) == 1:
            return mean
        return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def distance(name: str) -> str:
        # Reports of older studies have none.
        known = [e["distances"][name] for e in measured if e.get("distances")]
        if not known:
            return ""
        least = min((e["distances"][name] for e in grid), default=None)
        bracket = "" if least is None or name == "latent_std" else f" [{least:.2f}]"
        return cell(known, 2) + bracket

    columns = [
        cell([e["frechet_distance"] for e in measured], 1),
        *map(distance, DISTANCES),
        cell([e["accuracy"]["digit"] for e in measured], 2),
        cell([e["accuracy"]["direction"] for e in measured], 2),
        cell([e["within_caption_variance"] for e in measured], 3),
        str(measured[0]["model_calls_per_clip"]),
    ]
    return f"| {label} | {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
