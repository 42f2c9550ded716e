"""The options of a role change memory and time, not numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from app_ranks import read_losses, run_file, train
from ranks import run_on_ranks
from slow_cases import slow_but
from tiny_file import TINY

WAN = str(TINY / "wan")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {name: {"path": WAN} for name in ("student", "teacher", "critic")},
    "offloaded": {
        "student": {"path": WAN, "fsdp": {"cpu_offload": True}, "activation_checkpointing": True},
        "teacher": {"path": WAN, "fsdp": {"shard": False}, "offload": True},
        "critic": {"path": WAN, "fsdp": {"reshard_after_forward": False}},
    },
    "compiled": {
        "student": {"path": WAN, "compile": {"backend": "eager"}},
        "teacher": {"path": WAN, "fsdp": {}},
        "critic": {"path": WAN, "activation_checkpointing": True},
    },
    "one base": {
        "student": {"base": "teacher", "lora": {"rank": 2}},
        "teacher": {"path": WAN, "precision": "bf16"},
        "critic": {"base": "teacher", "lora": {"rank": 2}, "optimizer": {"lr": 6e-4}},
    },
}


def run(folder: Path, options: str, size: int, strategy: str | None) -> dict[int, Any]:
    name = f"{options.replace(' ', '_')}-{size}-{strategy}"
    file = run_file(
        folder / f"{name}.yaml",
        "dmd2",
        models=None,
        training={
            "max_train_steps": 3,
            "global_batch_size": 4,
            "distributed": {"strategy": strategy},
        },
        method_config={"generator_update_interval": 2},
        checkpoint={"export": [{"role": "student", "folder": "student", "ema": True}]},
    )
    values = yaml.safe_load(file.read_text())
    values["models"] = OPTIONS[options]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert run_on_ranks(train, file, size=size) == [""] * size
    assert (folder / name / "student" / "model_index.json").is_file()
    return read_losses(folder / name)


@pytest.mark.parametrize(
    ("options", "like", "strategy"),
    slow_but(
        ("offloaded",),
        [
            ("offloaded", "plain", "fsdp2"),
            ("compiled", "plain", "ddp"),
            ("one base", "one base", "fsdp2"),
        ],
        lambda case: case[0],
    ),
)
def test_options_change_no_number(tmp_path, options, like, strategy):
    one, two = run(tmp_path, like, 1, None), run(tmp_path, options, 2, strategy)
    assert one.keys() == two.keys()
    for iteration, values in one.items():
        for name in (n for n in values if n.startswith(("loss/", "grad_norm/"))):
            assert two[iteration][name] == pytest.approx(values[name], rel=2e-4), (iteration, name)
