"""Planted faults on the shipped tiny Wan: each raises its alarm long before half of the run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_file import TINY

pytestmark = pytest.mark.slow

STEPS = 600


def still_data(folder: Path, clips: int = 200) -> Path:
    """Copy the shipped data set with clips whose frames are all the first one."""
    shutil.copytree(TINY / "data", folder)
    shard, index = folder / "shard-00000.safetensors", folder / "index.json"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    vae = AutoencoderKLWan.from_pretrained(TINY / "wan" / "vae").eval()
    with torch.no_grad():
        moving = vae.decode(tensors["latents"][:clips].float()).sample
        still = moving[:, :, :1].expand_as(moving).contiguous()
        latents = vae.encode(still).latent_dist.mode()
    again = len(tensors["latents"]) // clips
    tensors["latents"] = latents.repeat(again, 1, 1, 1, 1).half().contiguous()
    save_file(tensors, shard, metadata)
    described = json.loads(index.read_text())
    described["shards"][0] |= {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    index.write_text(json.dumps(described))
    return folder


def planted(name: str, folder: Path) -> dict[str, Any]:
    """Return what differs from dmd2.yaml."""
    if name == "rate x 100":
        return {"training": {"optimizer": {"lr": 4e-2}}}
    if name == "guidance x 3":
        return {"method_config": {"real_score_guidance_scale": 4.5}}
    if name == "dead critic":
        return {"models": {"critic": {"optimizer": {"lr": 6e-10}}}}
    data = {"path": str(still_data(folder / "still"))}
    return {"data": data, "method_config": {"rollout": "data"}}


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("rate x 100", "collapse"),
        ("guidance x 3", "saturation"),
        ("dead critic", "still_weights"),
        ("still data", "motion"),
    ],
)
def test_a_planted_fault_raises_its_alarm_before_half_of_the_run(
    tiny: Callable[..., Path], app: Callable[..., Any], tmp_path: Path, fault: str, rule: str
) -> None:
    changes = planted(fault, tmp_path)
    changes.setdefault("training", {})
    changes["training"] |= {
        "max_train_steps": STEPS, "global_batch_size": 64, "progress": False, "trackers": ["jsonl"],
    }  # fmt: skip
    # It stops where the alarm is, which also shows that a rule can stop a run.
    callbacks = {"report": None, "health": {rule: {"action": "stop"}}}
    run = app(
        "--config", tiny("dmd2", validation=None, checkpoint={"export": []}, callbacks=callbacks,
                         **changes)
    )  # fmt: skip
    assert run.returncode == 75, run.stderr
    lines = (tmp_path / "out" / "health.jsonl").read_text().splitlines()
    alarms = [json.loads(line) for line in lines]
    (alarm,) = [alarm for alarm in alarms if alarm["rule"] == rule]
    assert alarm["iteration"] < STEPS / 2
