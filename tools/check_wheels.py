"""Build every package as a wheel and use them outside the workspace.

    uv run python tools/check_wheels.py

Twice, each in a fresh environment: all wheels, then distill-trainer with distill-protocols alone.
`uv lock` does not look at version bounds between members; installing the wheels does.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        run("uv", "build", "--all-packages", "--no-sources", "--wheel", "--out-dir", str(dist))
        wheels = sorted(dist.glob("*.whl"))
        check(Path(folder) / "all", wheels, "distill-train", "--plugins")
        light = [w for w in wheels if w.name.startswith(("distill_trainer-", "distill_protocols-"))]
        script = (
            "import distill_trainer, importlib.util as u; distill_trainer.DistillTrainer;"
            "assert u.find_spec('diffusers') is None and u.find_spec('transformers') is None"
        )
        check(Path(folder) / "light", light, "python", "-c", script)
    print(f"{len(wheels)} wheels install together, distill-trainer works alone")


def check(venv: Path, wheels: list[Path], *command: str) -> None:
    """Install by path (the bare name distill-trainer belongs to somebody else), then use."""
    run("uv", "venv", "--quiet", str(venv))
    python = str(venv / "bin" / "python")
    run("uv", "pip", "install", "--quiet", "--python", python, *map(str, wheels))
    run("uv", "pip", "check", "--python", python)
    run(str(venv / "bin" / command[0]), *command[1:], cwd=venv)


def run(*command: str, cwd: Path = ROOT) -> None:
    print("$", " ".join(command[:4]), flush=True)
    subprocess.run(command, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
