"""Peak memory of an export against the bytes of the exported role, format by format.

    uv run python tools/bench/export.py [--layers 4]

A Wan as wide as the 1.3B one (four layers: 211M parameters, 0.84 GB in fp32) with random weights is
written to a temporary folder, with a second one that stands for the trained weights, and adapters.
Each export runs in a process of its own, which reads the role from those files. Counted is what the
export adds to the process once everything is imported: the peak of its resident memory, which
includes pages of mapped files, and the peak of its anonymous memory, which is its own. Aim: at most
1.2 times the role.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANK = 32
CASES = {
    "diffusers fp32": ("full", {}),
    "diffusers bf16": ("full", {"precision": "bf16"}),
    "comfyui fp32": ("full", {"format": "comfyui"}),
    "lora by SVD": ("full", {"format": "lora", "lora_rank": RANK}),
    "LoRA, diffusers": ("lora", {}),
    "LoRA, comfyui bf16": ("lora", {"format": "comfyui", "precision": "bf16"}),
    "LoRA, lora": ("lora", {"format": "lora"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.folder, *CASES[given.case])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = build_folders(folder, given.layers)
        print(
            f"role: {facts['parameters'] / 1e6:.0f}M parameters, {facts['bytes'] / 1e9:.2f} GB, "
            f"largest tensor {facts['largest'] / 1e6:.0f} MB"
        )
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            print(
                f"{case:<20} {found['seconds']:6.1f} s   resident +{found['resident'] / 1e6:5.0f} "
                f"MB = {found['resident'] / facts['bytes']:.2f} x role   anonymous "
                f"+{found['anonymous'] / 1e6:5.0f} MB = {found['anonymous'] / facts['bytes']:.2f} x"
            )


def build_folders(folder: Path, layers: int) -> dict[str, int]:
    """Write ``base`` and ``role``, pipeline folders, and ``adapters.safetensors``."""
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from distill_adapters_wan import PUBLISHED, WAN
    from distill_diffusers.architecture import inspect_model
    from distill_diffusers.lora import adapted_layers, names_of
    from distill_protocols import LoraSpec, TensorInfo
    from distill_runtime import write_safetensors

    (published,) = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].transformers.values()
    config = {**published, "num_layers": layers}
    with torch.device("meta"):
        meta = WanTransformer3DModel(**config)
    facts = {
        name: TensorInfo(tuple(value.shape), value.dtype)
        for name, value in meta.state_dict().items()
    }
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        return 0.02 * torch.randn(facts[name].size, generator=generator)

    for part in ("base", "role"):
        shutil.copytree(ROOT / "configs" / "tiny" / "wan", folder / part)
        shutil.rmtree(folder / part / "transformer")
        meta.save_config(folder / part / "transformer")
        file = folder / part / "transformer" / "diffusion_pytorch_model.safetensors"
        write_safetensors(file, facts, drawn)
    sizes = adapted_layers(inspect_model(WAN, config), LoraSpec(rank=RANK))
    adapters = {}
    for layer, (taken, given) in sizes.items():
        a, b = names_of(layer)
        adapters[a], adapters[b] = torch.randn(RANK, taken), torch.randn(given, RANK)
    described = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in adapters.items()}
    write_safetensors(folder / "adapters.safetensors", described, adapters.__getitem__)
    return {
        "parameters": sum(value.numel() for value in meta.state_dict().values()),
        "bytes": sum(fact.nbytes for fact in facts.values()),
        "largest": max(fact.nbytes for fact in facts.values()),
    }


def measure(folder: Path, kind: str, request: dict[str, object]) -> dict[str, float]:
    """Export in this process; return seconds, and bytes above those before it."""
    import distill_diffusers.export.verification  # noqa: F401 - everything, so that imports do not count
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_diffusers.weights.sources import FileWeights
    from distill_protocols import ExportRequest, LoraSpec, RoleSpec, SamplerSpec

    lora = LoraSpec(rank=RANK) if kind == "lora" else None
    base = str(folder / "base")
    role = RoleSpec(name="student", path=base, trainable=True, lora=lora)
    weights = PLUGIN.weights(str(folder / "role"))
    if lora is not None:
        weights = {"transformer": FileWeights("adapters", [folder / "adapters.safetensors"])}
    config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
    exporter = PLUGIN.exporter(config, source=base)
    asked = ExportRequest(
        sampler=SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True),
        max_shard_bytes=200_000_000,
        **request,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, anonymous = status("VmRSS"), Anonymous()
    start = time.perf_counter()
    with anonymous:
        exporter.export(role, weights, folder / "export", asked)
    seconds = time.perf_counter() - start
    resident = status("VmHWM") - before
    shutil.rmtree(folder / "export")
    return {"seconds": seconds, "resident": resident, "anonymous": anonymous.added}


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Anonymous:
    """Peak of RssAnon within, looked at every two milliseconds; the kernel keeps no peak of it."""

    def __enter__(self) -> Anonymous:
        self._done = threading.Event()
        self._before = self._peak = status("RssAnon")
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, status("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added(self) -> int:
        """Bytes above the start."""
        return self._peak - self._before


if __name__ == "__main__":
    main()
