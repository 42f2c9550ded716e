"""LoRA roles on one set of weights."""

from __future__ import annotations

import pytest
import torch
import yaml
from family_cases import FAMILIES, PreparedFamily, train


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    made = {}

    def prepare(name: str) -> PreparedFamily:
        if name not in made:
            made[name] = PreparedFamily(FAMILIES[name], tmp_path_factory.mktemp("family"))
        return made[name]

    return prepare


def change(file, **sections):
    """Lay keys over sections of a run file."""
    values = yaml.safe_load(file.read_text())
    for name, keys in sections.items():
        values[name] = {**values[name], **keys}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


@pytest.mark.slow  # twice ten seconds, and the formats are in the suite of families
@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo 1.5"])
def test_lora_roles_share_the_teachers_weights(prepared, tmp_path, name):
    family = prepared(name)
    lora = {"base": "teacher", "lora": {"rank": 2}}
    path = {"path": str(family.path)}
    export = [
        {"role": "student", "folder": "student", "verify": True},
        {"role": "student", "folder": "lora", "format": "lora", "verify": True},
    ]
    file = change(
        family.write(tmp_path, "dmd2"),
        models={"teacher": path, "student": lora, "critic": lora}, checkpoint={"export": export},
    )  # fmt: skip
    run = train(file)
    trained = run.bundle["student"].trained
    assert trained is not None
    layers = {layer.split(".lora_")[0].split(".")[-1] for layer in trained["transformer"]}
    assert layers == {*("to_q", "to_k", "to_v", "0"),
                      *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}  # fmt: skip
    theirs, at_levels, _ = family.sample_exported(run, tmp_path / "out" / "student")
    # W x + B A x, and (W + B A) x.
    torch.testing.assert_close(theirs, at_levels, rtol=0, atol=1e-4)
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()
