"""Checkpointed activations, compiled blocks, weights that wait: the same numbers as without."""

from __future__ import annotations

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
import wan_ranks as wan
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_protocols import CapabilityError, CompileSpec, LoraSpec, WeightsError
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from wan_ranks import no_sharding, shard, spec

COUNTED = CompileSpec(backend="counted")


def saved_bytes(folder, **options) -> int:
    """Count bytes that the graph of a loss keeps for its backward pass, without weights."""
    bundle = wan.load([spec(folder, trainable=True, **options)])
    adapter = wan.adapter_of(bundle, folder)
    weights = {p.untyped_storage().data_ptr() for p in wan.parameters(bundle, "teacher").values()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = adapter.forward("teacher", *wan.inputs()).square().mean()
    loss.backward()
    return sum(kept.values())


def test_checkpointed_activations_are_few_and_change_nothing(pipeline_template):
    plain = wan.gradients(pipeline_template, [spec(pipeline_template, trainable=True)])
    role = spec(pipeline_template, trainable=True, activation_checkpointing=True)
    assert wan.gradients(pipeline_template, [role]) == plain
    less = saved_bytes(pipeline_template, activation_checkpointing=True)
    assert less < 0.5 * saved_bytes(pipeline_template)


OPTIONS = [
    {"activation_checkpointing": True},
    {"compile": COUNTED, "activation_checkpointing": True, "lora": LoraSpec(rank=2)},
]


def choices(folder) -> tuple[list, list]:
    """Return a role for each of OPTIONS, without and with them."""
    bare = [{"lora": options.get("lora")} for options in OPTIONS]
    plain, optioned = (
        [spec(folder, f"r{i}", trainable=True, **chosen) for i, chosen in enumerate(choice)]
        for choice in (bare, OPTIONS)
    )
    return plain, optioned


def test_options_change_no_name_and_no_number(pipeline_template):
    plain, optioned = choices(pipeline_template)
    expected = wan.gradients(pipeline_template, plain)
    gradients, calls = wan.compiled_gradients(pipeline_template, optioned, no_sharding)
    assert gradients == expected
    assert calls == 2 * 2  # two blocks, and again in the backward pass


def test_options_work_over_shards(pipeline_template):
    """To the order of a sum: the text's gradient comes from all blocks, and not always in turn."""
    plain, optioned = choices(pipeline_template)
    expected = wan.gradients(pipeline_template, plain)
    for rank in run_on_ranks(wan.compiled_gradients, pipeline_template, optioned, shard):
        assert not isinstance(rank, str), rank
        gradients, calls = rank
        assert calls == 2 * 2
        assert gradients.keys() == expected.keys()
        for name, bits in expected.items():
            theirs, ours = (np.frombuffer(b, dtype=np.float32) for b in (bits, gradients[name]))
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)])
def test_inductor(pipeline_template, lora):
    role = spec(pipeline_template, trainable=True, lora=lora)
    plain = wan.load([role])
    compiled = wan.load([spec(pipeline_template, trainable=True, lora=lora, compile=CompileSpec())])
    assert wan.weights_of(compiled) == wan.weights_of(plain)
    predictions = [
        wan.adapter_of(bundle, pipeline_template).forward("teacher", *wan.inputs())
        for bundle in (plain, compiled)
    ]
    assert torch.allclose(*predictions, atol=1e-5, rtol=1e-5)


# -- weights that wait ----------------------------------------------------------------------------


def waiting(folder, **student) -> tuple:
    roles = [
        spec(folder, "teacher", offload=True),
        spec(folder, "reward", offload=True, activation_checkpointing=True),
        spec(folder, "student", trainable=True, **student),
    ]
    bundle = wan.load(roles)
    return bundle, wan.adapter_of(bundle, folder)


def place(bundle, role: str) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in wan.parameters(bundle, role).items()}


@settings(max_examples=10)
@given(calls=st.lists(st.sampled_from(["teacher", "reward", "student"]), max_size=6))
def test_one_offloaded_role_at_a_time_is_on_the_device(pipeline_template, calls):
    bundle, adapter = waiting(pipeline_template)
    addresses = {role: place(bundle, role) for role in bundle.roles}
    with torch.no_grad():
        expected = {role: adapter.forward(role, *wan.inputs()) for role in bundle.roles}
        for role in calls:
            assert torch.equal(adapter.forward(role, *wan.inputs()), expected[role])
            for other in ("teacher", "reward"):
                moved = [
                    where != addresses[other][name] for name, where in place(bundle, other).items()
                ]
                assert all(moved) if other == role else not any(moved)
    assert place(bundle, "student") == addresses["student"]


def memory(bundle, role: str) -> list[StorageWeakRef]:
    return [StorageWeakRef(p.untyped_storage()) for p in wan.parameters(bundle, role).values()]


def gone(storages: list[StorageWeakRef]) -> int:
    gc.collect()
    return sum(storage.expired() for storage in storages)


def test_unloading_a_role_frees_the_device(pipeline_template):
    bundle, adapter = waiting(pipeline_template)
    with torch.no_grad():
        adapter.forward("teacher", *wan.inputs())
        away = memory(bundle, "teacher")
        assert gone(away) == 0
        adapter.forward("student", *wan.inputs())
    assert gone(away) == len(away)


@pytest.mark.parametrize("role", ["teacher", "reward"])
def test_a_graph_keeps_what_its_backward_pass_needs(pipeline_template, role):
    """Of ``reward`` the blocks come again, as its activations are computed again."""
    bundle, adapter = waiting(pipeline_template)
    addresses = place(bundle, role)
    x, t, cond = wan.inputs()
    gradients = []
    for others in ([], ["student"], ["teacher", "reward", "student"]):
        given_x = x.clone().requires_grad_()
        loss = adapter.forward(role, given_x, t, cond).square().mean()
        away = memory(bundle, role)
        with torch.no_grad():
            for other in others:
                adapter.forward(other, *wan.inputs())
        if others:
            assert place(bundle, role) == addresses
            assert (0 < gone(away) < len(away)) or role == "reward"
        loss.backward()
        gradients.append(given_x.grad)
        if others:
            reloaded = set(place(bundle, role).values()).isdisjoint(addresses.values())
            assert reloaded == (role == "reward")
        del loss
        adapter.forward("student", *wan.inputs())
        assert place(bundle, role) == addresses
        assert gone(away) == len(away)
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in pairwise(gradients))


@pytest.mark.parametrize("options", [{}, *({k: v} for k, v in OPTIONS[1].items())])
def test_the_backward_pass_of_another_role_has_the_device(pipeline_template, options):
    bundle, adapter = waiting(pipeline_template, **options)
    addresses = place(bundle, "teacher")
    loss = adapter.forward("student", *wan.inputs()).square().mean()
    with torch.no_grad():
        adapter.forward("teacher", *wan.inputs())
    assert not set(place(bundle, "teacher").values()) & set(addresses.values())
    loss.backward()
    assert place(bundle, "teacher") == addresses


# -- one base -------------------------------------------------------------------------------------

LORA = LoraSpec(rank=2)
WRONG_BASES = [
    ({}, {"base": "nobody"}, "no such role"),
    ({"trainable": True}, {}, "trainable"),
    ({"lora": LORA}, {}, "has lora"),
    ({}, {"lora": None}, "no lora"),
    ({"precision": "bf16"}, {}, "precision is fp32 and of 'teacher' bf16"),
    ({"offload": True}, {}, "one of them is offloaded"),
]


@pytest.mark.parametrize(("base", "guest", "message"), WRONG_BASES)
def test_roles_that_cannot_be_a_base_are_refused(pipeline_template, base, guest, message):
    roles = [
        spec(pipeline_template, **base),
        spec(
            pipeline_template,
            "student",
            **{"trainable": True, "lora": LORA, "base": "teacher", **guest},
        ),
    ]
    with pytest.raises(WeightsError, match=message):
        wan.load(roles)


def test_weights_for_a_role_beside_a_base(pipeline_template):
    """Adapters are taken; whole weights are the base's, which nobody may give either."""
    first = wan.load(wan.trio(pipeline_template))
    with torch.no_grad():
        for adapter in first["critic"].trained_parameters("transformer").values():
            adapter.fill_(0.01)
    given = {"student": first["critic"].weight_sources()}
    again = wan.load(wan.trio(pipeline_template), weights=given)
    ours, theirs = (b[r] for b, r in ((again, "student"), (first, "critic")))
    for name, value in theirs.trained_parameters("transformer").items():
        assert torch.equal(ours.trained_parameters("transformer")[name], value)
    full = first["teacher"].weight_sources()
    for role, message in (("student", "held once"), ("teacher", "weights of its path")):
        with pytest.raises(WeightsError, match=message):
            wan.load(wan.trio(pipeline_template), weights={role: full})


def test_roles_beside_a_base_are_spread_as_it_is(pipeline_template):
    for message in run_on_ranks(wan.error_of_mixture, pipeline_template):
        assert "otherwise than its base 'teacher'" in message


def test_a_role_beside_a_base_is_exported_like_any_lora(pipeline_template, tmp_path):
    """The saved file does not depend on whether the base was shared."""
    from distill_protocols import ExportRequest, SamplerSpec

    request = ExportRequest(sampler=SamplerSpec(steps=2), format="lora")
    trio = wan.load(wan.trio(pipeline_template))
    alone = spec(pipeline_template, "student", trainable=True, lora=LoraSpec(rank=3, alpha=6.0))
    files = []
    for role, bundle in ((wan.trio(pipeline_template)[0], trio), (alone, wan.load([alone]))):
        with torch.no_grad():
            for adapter in bundle["student"].trained_parameters("transformer").values():
                adapter.add_(0.1)
        folder = tmp_path / str(len(files)) / "student"
        exporter = PLUGIN.exporter(wan.CONFIG, source=str(pipeline_template))
        weights = bundle["student"].weight_sources()
        exporter.export(role, weights, folder, request)
        exporter.verify(role, weights, folder, request)
        files.append((folder / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1]


def test_an_attention_backend_is_that_of_its_role_and_torch_s_own_changes_no_number(
    pipeline_template,
):
    plain = spec(pipeline_template, trainable=True)
    native = spec(pipeline_template, trainable=True, attention_backend="native")
    expected = wan.gradients(pipeline_template, [plain])
    assert wan.gradients(pipeline_template, [native]) == expected


@pytest.mark.parametrize(
    ("backend", "trainable"),
    [("_native_cudnn", False), ("flex", True), ("_native_efficient", True)],
)
def test_a_kernel_that_this_device_does_not_have_is_refused_while_roles_are_loaded(
    pipeline_template, backend, trainable
):
    role = spec(pipeline_template, trainable=trainable, attention_backend=backend)
    with pytest.raises(CapabilityError) as error:
        wan.load([role])
    assert f"role 'teacher': attention backend {backend!r} does not run on cpu in fp32" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("backend", "causal", "message"),
    [
        ("native", False, None),
        ("fast", False, "diffusers knows no attention backend 'fast'"),
        ("native", True, None),
    ],
)
def test_attention_backends_that_are_refused(pipeline_template, backend, causal, message):
    config = WanPipelineConfig(
        num_frames=5,
        height=32,
        width=48,
        max_sequence_length=6,
        causal=CausalConfig(roles=("student",), chunk_frames=1) if causal else None,
    )
    role = spec(pipeline_template, "student", attention_backend=backend)
    problems = list(PLUGIN.role_problems(role, config))
    assert [(p.path, message in p.message) for p in problems] == (
        [] if message is None else [(("attention_backend",), True)]
    )
    assert (backend in PLUGIN.attention_backends(role, config)) == (message is None)
