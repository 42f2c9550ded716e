"""The family's section of a run file: what it refuses, and its messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from distill_adapters_ltx import PLUGIN, LTXPipelineConfig
from distill_protocols import RoleSpec, WeightsError
from hypothesis import given
from hypothesis import strategies as st

CLIP = {"num_frames": 121, "height": 512, "width": 768}


def test_the_defaults_are_those_of_the_pipeline_and_of_lightricks():
    config = LTXPipelineConfig(**CLIP)
    assert (config.frame_rate, config.max_sequence_length) == (25, 128)  # LTXPipeline.__call__
    assert (config.decode_timestep, config.decode_noise_scale) == (0.05, 0.025)  # its yaml files
    assert (config.guidance_rescale, config.cfg_batched) == (0, True)
    assert config.components is None
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.num_frames = 9  # type: ignore[misc]


@given(st.integers(-40, 400))
def test_just_8k_plus_1_frames(frames):
    if frames >= 1 and (frames - 1) % 8 == 0:
        assert LTXPipelineConfig(**{**CLIP, "num_frames": frames}).num_frames == frames
        return
    with pytest.raises(ValueError, match=r"must be 8k \+ 1, because") as excinfo:
        LTXPipelineConfig(**{**CLIP, "num_frames": frames})
    *_, below, _, above, _, _ = str(excinfo.value).split()
    assert int(above) - int(below) == 8
    assert int(below) % 8 == 1
    assert int(below) < max(frames, 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_frames", 120, "113 or 121"),
        ("num_frames", 0, "1 or 9"),
        ("height", 480 + 16, "480 or 512"),
        ("width", 0, "32 or 64"),
        ("width", 848, "832 or 864"),
        ("frame_rate", 0, "above 0"),
        ("frame_rate", float("nan"), "above 0"),
        ("max_sequence_length", 0, "at least 1"),
        ("text_encoder_precision", "fp16", "fp16"),
        ("decode_timestep", 50, r"within \[0, 1\]: it is the noise level"),
        ("decode_noise_scale", -0.1, r"within \[0, 1\]"),
        ("guidance_rescale", 1.5, r"within \[0, 1\]"),
    ],
)
def test_refused_values(key, value, message):
    with pytest.raises(ValueError, match=message):
        LTXPipelineConfig(**{**CLIP, key: value})


def test_the_package_imports_no_torch():
    code = (
        "import sys, distill_adapters_ltx as ltx\n"
        "ltx.LTXPipelineConfig(num_frames=9, height=32, width=32)\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_examples_of_the_readme(folder_of):
    readme = Path(__file__).parents[2] / "packages" / "distill-adapters-ltx" / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(examples) == 1
    scope = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), scope)
    config = LTXPipelineConfig(num_frames=9, height=32, width=64)
    clip = scope["sample"](str(folder_of("0.9.5")), "a seven moving left", config, "cpu")
    assert clip.shape == (1, 3, 9, 32, 64)
    assert clip.std() > 0.01


@pytest.mark.parametrize("entry", ["cross_attention_dim", "attention_head_dim"])
def test_layers_that_do_not_fit_each_other_are_one_error(folder_of, tmp_path, entry):
    """A key that is misspelt has the class's default."""
    folder = shutil.copytree(folder_of("0.9.0"), tmp_path / "model")
    file = folder / "transformer" / "config.json"
    values = json.loads(file.read_text())
    values[f"{entry}_"] = values.pop(entry)
    file.write_text(json.dumps(values))
    role = RoleSpec(name="student", path=str(folder), trainable=True)
    config = LTXPipelineConfig(num_frames=17, height=64, width=96)
    with pytest.raises(
        WeightsError, match=r"a call of the transformer of .* fails: .* config\.json"
    ):
        PLUGIN.plan_call(role, config, source=str(folder), batch=1)
