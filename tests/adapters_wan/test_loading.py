"""Weights arrive whole, in the right precision and independent, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from distill_adapters_wan import PLUGIN
from distill_protocols import RoleSpec, WeightsError
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def load(pipeline, config, **kwargs):
    spec = RoleSpec(name="r", path=str(pipeline), **{"trainable": True, **kwargs})
    return PLUGIN.load([spec], config, device=CPU)["r"]


def edit(pipeline, change):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_the_same_outputs_as_diffusers_own_loading(pipeline, config):
    """Outputs, not state dicts: the rotary tables are in no state dict."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(pipeline / "transformer").eval()
    ours = load(pipeline, config).modules["transformer"].eval()
    x = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    args = {"timestep": torch.tensor([600.0]), "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        expected = theirs(x, **args)[0]
        assert expected.std() > 0.01
        # Not bitwise: theirs stays in the mapped file, whose alignment picks other kernels.
        assert torch.equal(ours.rope.freqs_cos, theirs.rope.freqs_cos)
        assert torch.equal(ours.rope.freqs_sin, theirs.rope.freqs_sin)
        assert torch.allclose(ours(x, **args)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda w: w.pop("proj_out.bias"), "1 missing: proj_out.bias"),
        (lambda w: w.update(stray=torch.zeros(2)), "1 unexpected: stray"),
        (lambda w: w.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias \[3\] instead of"),
    ],
)
def test_unmatched_keys_are_named(pipeline, config, change, kind):
    edit(pipeline, change)
    with pytest.raises(WeightsError, match=kind):
        load(pipeline, config)


def test_all_unmatched_keys_are_told_at_once(pipeline, config):
    def change(weights):
        weights["stray"] = weights.pop("proj_out.weight")

    edit(pipeline, change)
    with pytest.raises(WeightsError, match=r"missing: proj_out.weight.*unexpected: stray"):
        load(pipeline, config)


def test_a_truncated_file_is_named(pipeline, config):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=str(file)):
        load(pipeline, config)


def test_a_damaged_config_is_named(pipeline, config):
    (pipeline / "transformer/config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(pipeline, config)


def test_roles_of_one_path_share_nothing(pipeline, config):
    specs = [
        RoleSpec(name=name, path=str(pipeline), trainable=name != "teacher")
        for name in ("student", "teacher", "critic")
    ]
    bundle = PLUGIN.load(specs, config, device=CPU)
    before = [p.clone() for p in bundle["teacher"].modules["transformer"].parameters()]
    on_disk = (pipeline / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in bundle["student"].modules["transformer"].parameters():
            parameter.fill_(9.0)
    for name in ("teacher", "critic"):
        now = bundle[name].modules["transformer"].parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert (pipeline / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == on_disk


def test_precision_and_mode(pipeline, config):
    frozen = load(pipeline, config, trainable=False, precision="bf16").modules["transformer"]
    for name, parameter in frozen.named_parameters():
        wide = {"time_embedder", "norm2", "scale_shift_table"} & set(name.split("."))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert {b.dtype for b in frozen.buffers()} == {torch.float32}
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = load(pipeline, config, trainable=True, precision="bf16").modules["transformer"]
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


def test_a_two_expert_folder_is_refused(pipeline, config):
    import shutil

    shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
    file = pipeline / "model_index.json"
    index = json.loads(file.read_text())
    index["transformer_2"] = index["transformer"]
    file.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="experts"):
        load(pipeline, config)
