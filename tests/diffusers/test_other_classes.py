"""Roles, plans and options of a model class that no package here has a family for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

import pytest
import torch
from attrs import evolve
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from distill_diffusers.architecture import inspect_model
from distill_diffusers.descriptions import describe_model
from distill_diffusers.lora import is_adapter
from distill_diffusers.planning.calls import measure_call, plan_call
from distill_diffusers.planning.modules import plan_modules
from distill_diffusers.roles import attention
from distill_diffusers.roles.loading import RoleLoader
from distill_protocols import (
    CompileSpec,
    DiscriminatorSpec,
    LoraSpec,
    RoleHandle,
    RoleSpec,
    WeightsError,
)
from other_kinds import LTX
from torch import Tensor

CPU = torch.device("cpu")
SHAPES = {"latents": (2, 12, 6), "t": (2,), "text": (2, 5, 12)}


def describe(path: str):
    return describe_model(LTX, path, {})


def load(*roles: RoleSpec, **options):
    return RoleLoader(kind=LTX, describe=describe).load_bundle(roles, device=CPU, **options)


def spec(folder, name: str = "student", *, trainable: bool = True, **options) -> RoleSpec:
    return RoleSpec(name=name, path=str(folder), trainable=trainable, **options)


def call(role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
    """Packed latents [B, L, C], as LTXPipeline calls its transformer."""
    dtype = role.modules["transformer"].get_parameter(LTX.stored_like).dtype
    (v,) = role.modules["transformer"](
        hidden_states=inputs["latents"].to(dtype),
        encoder_hidden_states=inputs["text"].to(dtype),
        timestep=inputs["t"].to(dtype),
        encoder_attention_mask=torch.ones(*inputs["text"].shape[:2], dtype=dtype),
        num_frames=1,
        height=3,
        width=4,
        return_dict=False,
    )
    return v


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


OPTIONS = {
    "trained": {},
    "checkpointed": {"activation_checkpointing": True},
    "LoRA in bf16": {"lora": LoraSpec(rank=2), "precision": "bf16"},
    "frozen in bf16": {"trainable": False, "precision": "bf16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_loaded_weights_and_calls_take_the_planned_bytes(ltx_folder, name):
    role = spec(ltx_folder, **OPTIONS[name])
    (plan,) = plan_modules(LTX, describe(role.path), role)
    handle = load(role)["student"]
    module = handle.modules["transformer"]
    assert {t.name: (t.shape, t.dtype, t.trained) for t in plan.tensors} == {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()
    }
    assert handle.blocks["transformer"] == tuple(f"transformer_blocks.{i}" for i in range(4))
    planned = plan_call(LTX, describe(role.path).main, role, call, SHAPES)
    measured = measure_call(handle, call, inputs())
    assert planned.most == pytest.approx(measured.most, rel=0.02)
    assert planned.held == pytest.approx(measured.held if role.trainable else 0, rel=0.02)


def test_a_role_is_the_model_of_its_folder_and_its_options_change_no_number(ltx_folder):
    real = LTXVideoTransformer3DModel.from_pretrained(ltx_folder / "transformer")
    bundle = load(
        spec(ltx_folder, "teacher", trainable=False),
        spec(ltx_folder, "student", base="teacher", lora=LoraSpec(rank=2)),
        spec(ltx_folder, "waits", trainable=False, offload=True),
        spec(ltx_folder, "native", trainable=False, attention_backend="native"),
    )
    expected = call(RoleHandle(name="real", modules={"transformer": real}), inputs())
    for name in bundle.roles:
        assert torch.equal(call(bundle[name], inputs()), expected), name
    shared = dict(bundle["teacher"].modules["transformer"].named_parameters())
    own = dict(bundle["student"].modules["transformer"].named_parameters())
    assert {n for n in own if is_adapter(n)} == bundle["student"].trained["transformer"]
    layer = "transformer_blocks.0.attn1.to_q"
    weight, other = own[f"{layer}.base_layer.weight"], shared[f"{layer}.weight"]
    assert weight.data_ptr() == other.data_ptr()


def test_a_discriminator_fits_the_features_of_the_class(ltx_folder):
    heads = DiscriminatorSpec(on="teacher", blocks=(1, 3), width=8)
    bundle = load(spec(ltx_folder, "teacher", trainable=False), spec(ltx_folder, heads=heads))
    assert bundle["student"].modules["heads"].features == 16
    beyond = DiscriminatorSpec(on="teacher", blocks=(4,), width=8)
    with pytest.raises(WeightsError, match=r"block 4 must be within 0 \.\. 3"):
        load(spec(ltx_folder, "teacher", trainable=False), spec(ltx_folder, heads=beyond))


def test_compiled_are_the_blocks_of_any_class(ltx_folder):
    module = load(spec(ltx_folder, compile=CompileSpec(backend="eager")))["student"].modules[
        "transformer"
    ]
    compiled = {name for name, m in module.named_modules() if m._compiled_call_impl is not None}
    assert compiled == {f"transformer_blocks.{i}" for i in range(4)}


def test_an_attention_backend_is_one_roles_alone(ltx_folder):
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()
    bundle = load(
        spec(ltx_folder, "plain"), spec(ltx_folder, "own", attention_backend="_native_math")
    )
    assert registry.get_active_backend() == before
    backends = {
        name: {
            m.processor._attention_backend
            for m in role.modules["transformer"].modules()
            if hasattr(m, "processor")
        }
        for name, role in bundle.roles.items()
    }
    assert backends == {"plain": {None}, "own": {"_native_math"}}
    outputs = [call(role, inputs()) for role in bundle.roles.values()]
    assert torch.allclose(*outputs, atol=1e-5)
    assert "_native_math" in attention.available_backends(LTX)


def test_an_attention_backend_that_cannot_be_set_is_explained():
    assert attention.backend_problem(LTX, "native") is None
    unknown = attention.backend_problem(LTX, "fast")
    assert "diffusers knows no attention backend 'fast'" in str(unknown)
    names = ("flash", "sage", "xformers")
    missing = [name for name in names if attention.backend_problem(LTX, name)]
    for name in missing:
        assert name not in attention.available_backends(LTX)
        assert "install" in str(attention.backend_problem(LTX, name))


def test_kernels_that_are_offered_to_a_class_with_a_bias_take_one():
    """Each registered kernel is called as LTX's attention calls it; what needs a GPU or a package
    is read."""
    biased = evolve(LTX, attention_bias=True)
    query = torch.randn(1, 3, 2, 8)
    bias = torch.tensor([[[[0.0, -10000.0, 0.0]]]]).expand(1, 2, 3, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(query.transpose(1, 2),) * 3, attn_mask=bias
    ).transpose(1, 2)
    for name in ("native", "_native_math"):
        assert attention.backend_problem(biased, name) is None
        kernel = attention_dispatch._AttentionBackendRegistry._backends[name]
        torch.testing.assert_close(kernel(query, query, query, attn_mask=bias), expected)
    refuses = re.compile(
        r"attn_mask is not None:\n +raise ValueError|_normalize_attn_mask|_mask_npu"
    )
    for name, kernel in attention_dispatch._AttentionBackendRegistry._backends.items():
        takes_none = refuses.search(inspect.getsource(kernel)) is not None
        assert (name in attention.TAKE_A_BIAS) != takes_none, name


def test_a_plan_counts_what_the_attention_backend_holds(ltx_folder):
    role = spec(ltx_folder, attention_backend="_native_math")
    main = describe(role.path).main
    long = {"latents": (1, 12, 6), "t": (1,), "text": (1, 5, 12)}
    fused = plan_call(LTX, main, spec(ltx_folder), call, long)
    assert plan_call(LTX, main, role, call, long).held > fused.held


def test_the_index_states_which_transformers_there_are(ltx_folder):
    assert list(describe(str(ltx_folder)).transformers) == ["transformer"]
    assert inspect_model(LTX, describe(str(ltx_folder)).main).width == 16
