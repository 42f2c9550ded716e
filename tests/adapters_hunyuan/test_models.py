"""Sizes of the published models, models that are refused, and plans of calls."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from attrs import evolve
from diffusers import HunyuanVideo15Transformer3DModel
from distill_adapters_hunyuan import (
    HUNYUAN_VIDEO15_PLUGIN,
    HUNYUAN_VIDEO_PLUGIN,
    HunyuanVideo15Config,
    HunyuanVideoConfig,
)
from distill_adapters_hunyuan.video15.calling import call_transformer, with_image_channels
from distill_adapters_hunyuan.video15.planning import PlannedTransformer
from distill_protocols import ModelBundle, RoleHandle, RoleSpec, WeightsError

CONFIG = HunyuanVideoConfig(num_frames=9, height=32, width=48, max_sequence_length=8)
CONFIG15 = HunyuanVideo15Config(
    num_frames=9, height=32, width=32, max_sequence_length=8, glyph_sequence_length=8
)


@pytest.mark.parametrize(
    ("plugin", "hub_id", "parameters"),
    [
        (HUNYUAN_VIDEO_PLUGIN, "hunyuanvideo-community/HunyuanVideo", 12_821_012_544),
        (
            HUNYUAN_VIDEO15_PLUGIN,
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v",
            8_326_608_160,
        ),
    ],
)
def test_parameters_of_the_published_models(plugin, hub_id, parameters):
    config = CONFIG if plugin is HUNYUAN_VIDEO_PLUGIN else CONFIG15
    plan = plugin.plan(RoleSpec(name="student", path=hub_id, trainable=True), config)
    assert sum(module.parameters for module in plan.modules) == parameters


def changed(folder, to, *, index=None, transformer=None):
    """Copy a pipeline folder with other entries of its configurations."""
    shutil.copytree(folder, to)
    for name, entries in (("model_index.json", index), ("transformer/config.json", transformer)):
        file = to / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **(entries or {})}))
    return to


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (
            {"index": {"_class_name": "HunyuanVideoImageToVideoPipeline"}},
            "together with the prompt",
        ),
        ({"transformer": {"guidance_embeds": False}}, "has no guidance_embeds"),
        ({"transformer": {"image_condition_type": "token_replace"}}, "reads a picture"),
    ],
)
def test_models_that_hunyuan_video_would_call_wrongly(hunyuan_folder, tmp_path, entries, reason):
    folder = changed(hunyuan_folder("video"), tmp_path / "model", **entries)
    role = RoleSpec(name="student", path=str(folder), trainable=True)
    (problem,) = HUNYUAN_VIDEO_PLUGIN.role_problems(role, CONFIG)
    assert reason in problem.message
    with pytest.raises(WeightsError, match=reason):
        HUNYUAN_VIDEO_PLUGIN.load([role], CONFIG, device=torch.device("cpu"))


def test_a_model_of_average_velocities_is_sampled_and_not_trained(hunyuan_folder, tmp_path):
    path = str(hunyuan_folder("i2v-step-distilled"))
    role = RoleSpec(name="student", path=path, trainable=True)
    (problem,) = HUNYUAN_VIDEO15_PLUGIN.role_problems(role, CONFIG15)
    assert "use_meanflow" in problem.message
    assert list(HUNYUAN_VIDEO15_PLUGIN.role_problems(evolve(role, trainable=False), CONFIG15)) == []
    from_text = {"_class_name": "HunyuanVideo15Pipeline"}
    folder = changed(hunyuan_folder("i2v-step-distilled"), tmp_path / "model", index=from_text)
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    (problem,) = HUNYUAN_VIDEO15_PLUGIN.role_problems(role, CONFIG15)
    assert "gives it one" in problem.message


def test_roles_read_a_picture_all_or_none(hunyuan_folder):
    roles = [
        RoleSpec(name=name, path=str(hunyuan_folder(name)), trainable=False)
        for name in ("t2v", "i2v")
    ]
    bundle = HUNYUAN_VIDEO15_PLUGIN.load(roles, CONFIG15, device=torch.device("cpu"))
    with pytest.raises(WeightsError, match="some read a first frame and others none"):
        HUNYUAN_VIDEO15_PLUGIN.adapter(bundle, CONFIG15, source=roles[0].path)


# -- plans ----------------------------------------------------------------------------------------


def test_a_guided_call_of_hunyuan_video_takes_no_more_memory(hunyuan_folder):
    path = str(hunyuan_folder("video"))
    role = RoleSpec(name="teacher", path=path, trainable=False)
    plans = [
        HUNYUAN_VIDEO_PLUGIN.plan_call(role, CONFIG, source=path, batch=2, guided=guided)
        for guided in (False, True)
    ]
    assert plans[0] == plans[1]
    assert plans[0] is not None
    assert plans[0].most > 0


@torch.no_grad()
def test_the_transformer_of_plans_computes_what_the_model_does(hunyuan_folder):
    """From a picture, but for rounding; so it takes the same memory."""
    folder = hunyuan_folder("i2v")
    model = HunyuanVideo15Transformer3DModel.from_pretrained(folder, subfolder="transformer")
    planned = PlannedTransformer.from_config(model.config)
    planned.load_state_dict(model.state_dict())
    adapter = HUNYUAN_VIDEO15_PLUGIN.adapter(ModelBundle({}), CONFIG15, source=str(folder))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cond = adapter.encode_condition(['a "left" seven', "moving"])
    tensors = adapter.images.with_image(cond, pictures).tensors
    x_t = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(2))
    outputs = [
        call_transformer(
            RoleHandle(name="teacher", modules={"transformer": module}),
            x_t, torch.tensor([833.3, 250.0]), **tensors,
        )
        for module in (model, planned)
    ]  # fmt: skip
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_channels_of_a_picture():
    """x_t, the picture on the first latent frame, and 1 there."""
    x_t, image = torch.randn(1, 2, 3, 2, 2), torch.randn(1, 2, 1, 2, 2)
    given = with_image_channels(x_t, image)
    assert given.shape == (1, 5, 3, 2, 2)
    assert torch.equal(given[:, :2], x_t)
    assert torch.equal(given[:, 2:4, :1], image)
    assert torch.equal(given[:, 4, 0], torch.ones(1, 2, 2))
    assert not given[:, 2:, 1:].any()
    assert not with_image_channels(x_t, None)[:, 2:].any()
