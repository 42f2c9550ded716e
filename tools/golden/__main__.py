"""Records what every tiny run file computes, and compares a tree with a record.

    uv run tools/golden record          # of this tree, into tools/golden/record.json
    uv run tools/golden compare         # exit status 1 where anything differs by a bit
    uv run tools/golden compare --only dmd2 kd

A refactor is proven by identical numbers. For each run file in configs/tiny the real app runs 20
iterations of 16 clips, and the record holds

- every loss and metric of every iteration, as printed in full precision (timings left out),
- the SHA-256 of every file that it exports,
- the SHA-256 of a validation clip of each view of the student.

The trajectories that KD learns from are made and hashed first. The bits of a CPU's arithmetic are
those of one kind of processor and one version of torch, so the record names both: on another
machine, also one whose processor has the same name, record the older tree there first. About six
minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"
RECORD = Path(__file__).with_name("record.json")
ITERATIONS = 20
BATCH = 16
TRAJECTORIES = 32
PROMPT = "the digit seven moving left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="the file (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run files, without .yaml")
    args = parser.parse_args()
    names = args.only or [path.stem for path in sorted(TINY.glob("*.yaml"))]
    if args.command == "record":
        record = {"machine": machine(), "runs": dict(measure(names))}
        args.record.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded {len(record['runs'])} runs in {args.record}")
        return 0
    record = json.loads(args.record.read_text())
    for key, recorded in record["machine"].items():
        if (here := machine()[key]) != recorded:
            print(f"note: the record was made with {key} {recorded!r}; this is {here!r}")
    differing = 0
    for name, run in measure(names):
        differences = list(compare(record["runs"][name], run))
        differing += bool(differences)
        print(f"{name}: {'equal' if not differences else ''}", flush=True)
        for line in differences[:10]:
            print(f"    {line}")
    print("equal to the bit" if not differing else f"{differing} of {len(names)} differ")
    return bool(differing)


def measure(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compute the numbers of each run file; trajectories come first, as KD reads them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        needed = [name for name in names if name != "trajectories"]
        trajectories = make_trajectories(folder)
        if "trajectories" in names:
            yield "trajectories", {"files": trajectories}
        for name in needed:
            yield name, train(name, folder)


def make_trajectories(folder: Path) -> dict[str, str]:
    values = absolute(read(TINY / "trajectories.yaml"))
    output = folder / "trajectories"
    values["trajectories"] |= {
        "output_dir": str(output), "limit": TRAJECTORIES, "batch_size": BATCH,
        "samples_per_shard": BATCH,
    }  # fmt: skip
    start("trajectories", values, folder)
    return hashes(output, "*.safetensors")


def train(name: str, folder: Path) -> dict[str, Any]:
    """Return losses, exports and clips of 20 iterations of ``configs/tiny/<name>.yaml``."""
    values = absolute(read(TINY / f"{name}.yaml"))
    output = folder / name
    values["training"] |= {
        "output_dir": str(output), "max_train_steps": ITERATIONS, "global_batch_size": BATCH,
        "log_every": 1, "cpu_threads": 1,
    }  # fmt: skip
    if "tiny-trajectories" in values["data"]["path"]:
        values["data"]["path"] = str(folder / "trajectories")
    values["checkpoint"] |= {"every_steps": ITERATIONS, "resume": "none"}
    for role in values["models"].values():
        role.pop("init_from", None)  # the run that it would start from is another one
    for callback in ("report", "step_timer"):
        values["callbacks"].pop(callback, None)
    values["callbacks"]["ema"] |= {"start_update": 1}  # or the average is the live student still
    values["validation"] = {
        "every_steps": ITERATIONS,
        "prompts": [PROMPT],
        "views": {"live": {"role": "student"}, "averaged": {"role": "student", "ema": True}},
    }
    start("train", values, folder)
    exported = {
        f"{export['folder']}/{path}": digest
        for export in values["checkpoint"]["export"]
        for path, digest in hashes(output / export["folder"], "*").items()
    }
    return {
        "metrics": read_metrics(output / "metrics.jsonl"),
        "files": exported | hashes(output / "validation", "*.png"),
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file without times."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(("time", "memory"))}
        for line in lines
    ]


def compare(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each value that differs from the recorded one."""
    pairs = zip(recorded.get("metrics", []), measured.get("metrics", []), strict=False)
    for old, new in pairs:
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"{key} of iteration {old.get('iteration')}: {old.get(key)} -> {new.get(key)}"
    if len(recorded.get("metrics", [])) != len(measured.get("metrics", [])):
        yield "another number of lines in metrics.jsonl"
    old, new = recorded["files"], measured["files"]
    for path in sorted({*old, *new}):
        if old.get(path) != new.get(path):
            yield f"{path}: {old.get(path, 'absent')[:12]} -> {new.get(path, 'absent')[:12]}"


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {
        # Some files name the folder of a model: it shall not matter where the tree is.
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes().replace(str(ROOT).encode(), b"<root>")
        ).hexdigest()
        for path in files
    }


def start(app: str, values: dict[str, Any], folder: Path) -> None:
    file = folder / f"{app}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "apps" / app), "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )


class Loader(yaml.SafeLoader):
    """Reads `on` as a word, as the app does, and not as true."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))


def read(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(), Loader)


def absolute(value: Any) -> Any:
    """Replace relative paths in ``value``, as seen from configs/tiny, by absolute ones."""
    if isinstance(value, dict):
        return {key: absolute(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((TINY / value).resolve())
    return value


def machine() -> dict[str, str]:
    """Name what decides the last bits: the processor's kind (its name is not enough), and code."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    values = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    kind = [
        values[key] for key in ("model name", "cpu family", "model", "stepping") if key in values
    ]
    vectors = sorted(word for word in values.get("flags", "").split() if word.startswith("avx"))
    return {
        "processor": " ".join([*(kind or [platform.processor()]), *vectors]),
        "torch": metadata.version("torch"),
        "diffusers": metadata.version("diffusers"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
