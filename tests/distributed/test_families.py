"""Families outside Wan train on two processes that shard as on one; see ``test_same_numbers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from app_ranks import assert_weights_alike, read_losses, read_weights, train
from family_cases import FAMILIES, PreparedFamily
from ranks import run_on_ranks

TOLERANCE = 2e-4
FSDP2 = {"distributed": {"strategy": "fsdp2"}, "batch_size_per_device": 1}


def write(family: PreparedFamily, folder: Path, lora: bool, training: dict[str, Any]) -> Path:
    """Write a dmd2 run without validation and export; texts of its batch differ in length."""
    folder.mkdir()
    file = family.write(folder, "dmd2")
    values = yaml.safe_load(file.read_text())
    if lora:
        role = {"base": "teacher", "lora": {"rank": 2}}
        values["models"] = {"teacher": values["models"]["teacher"], "student": role, "critic": role}
    values["training"] |= training
    del values["validation"], values["checkpoint"]["export"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


@pytest.mark.slow  # three processes of ten seconds each; LTX-Video's is in the normal suite
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("HunyuanVideo", False),
        ("HunyuanVideo 1.5 I2V", False),
        ("LongCat-Video", True),
        ("Qwen-Image", True),
        ("Z-Image", True),
    ],
)
def test_two_processes_that_shard_train_as_one_does(tmp_path, name, lora):
    family = PreparedFamily(FAMILIES[name], tmp_path)
    one = write(family, tmp_path / "one", lora, {})
    two = write(family, tmp_path / "two", lora, FSDP2)
    assert run_on_ranks(train, one, size=1) == [""]
    assert run_on_ranks(train, two, size=2) == ["", ""]
    a, b = (read_losses(tmp_path / folder / "out") for folder in ("one", "two"))
    assert len(a) == 5
    for iteration, numbers in a.items():
        assert numbers.keys() == b[iteration].keys()
        for key, value in numbers.items():
            least = TOLERANCE if key == "student_mean" else 1e-8  # of addends of both signs
            assert b[iteration][key] == pytest.approx(value, rel=TOLERANCE, abs=least), (
                iteration,
                key,
            )
    module = family.plugin.kind.modules[0]
    first, second = (read_weights(tmp_path / n / "out", module=module) for n in ("one", "two"))
    assert_weights_alike(first, second)
