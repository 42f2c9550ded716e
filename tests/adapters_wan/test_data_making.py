"""The adapter without roles, as data are made: VAE and encoders alone, and no transformer."""

from __future__ import annotations

import pytest
import torch
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_conditioning import DataConfig, LatentDataset, ShardWriter, preprocess
from distill_diffusers.config import BucketConfig
from distill_protocols import Condition, ConditioningError, DataError, ModelBundle, WeightsError
from wan_variants import VARIANTS, build, template

CONFIG = WanPipelineConfig(num_frames=9, height=32, width=48, max_sequence_length=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    base = root / "template"
    template(base)
    return {name: build(name, base, root / name) for name in ("t2v", "i2v-2.1", "ti2v")}


def clip(frames: int = 9, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, frames, height, width, generator=generator)


@pytest.mark.parametrize("name", ["i2v-2.1", "ti2v"])
def test_first_frames_are_encoded_though_no_transformer_is_there(folders, tmp_path, name):
    variant, folder = VARIANTS[name], folders[name]
    for weights in folder.glob("transformer*/*.safetensors"):
        weights.rename(weights.with_suffix(".away"))  # whoever loads them fails
    try:
        with pytest.raises(WeightsError):
            PLUGIN.weights(str(folder))
        adapter = PLUGIN.adapter(ModelBundle({}), variant.config, source=str(folder))
        with ShardWriter(tmp_path) as writer:
            clips = [("a", "x", clip())]
            preprocess(clips, adapter, writer, negative_prompt="", first_frames=True)
    finally:
        for weights in folder.glob("transformer*/*.away"):
            weights.rename(weights.with_suffix(".safetensors"))
    cond = LatentDataset(DataConfig(path=str(tmp_path))).read(torch.tensor([0])).cond
    needed = PLUGIN.condition_shapes(variant.config, source=str(folder))
    assert needed.keys() <= cond.tensors.keys()
    assert "image_latents" in cond.tensors


def test_first_frames_of_each_size_of_clips(folders):
    """As an adapter of that size alone encodes them."""
    variant, source = VARIANTS["i2v-2.1"], str(folders["i2v-2.1"])
    sizes = [(9, 32, 48), (5, 32, 48), (5, 48, 32)]
    buckets = tuple(BucketConfig(num_frames=f, height=h, width=w) for f, h, w in sizes)
    length = variant.config.max_sequence_length
    config = WanPipelineConfig(buckets=buckets, max_sequence_length=length)
    adapter = PLUGIN.adapter(ModelBundle({}), config, source=source)
    cond = Condition({"text": torch.zeros(1, length, 4)})
    for bucket, size in zip(buckets, sizes, strict=True):
        picture = clip(*size)[None, :, 0]
        alone = PLUGIN.adapter(ModelBundle({}), config.of_bucket(bucket), source=source)
        expected = alone.with_image(cond, picture).tensors
        given = adapter.with_image(cond, picture, size[0]).tensors
        assert all(torch.equal(given[name], expected[name]) for name in expected)
        own = PLUGIN.config_of_clip(config, size)
        shapes = PLUGIN.condition_shapes(own, source=source)
        assert given["image_latents"].shape[1:] == shapes["image_latents"]
        assert adapter.encode(clip(*size)[None]).shape[1:] == shapes["image_latents"]
    largest = adapter.with_image(cond, clip()[None, :, 0]).tensors["image_latents"]
    assert largest.shape[2] == 3
    with pytest.raises(ConditioningError, match=r"\[1, 3, 32, 48\] or \[1, 3, 48, 32\]"):
        adapter.with_image(cond, clip(9, 32, 32)[None, :, 0])
    with pytest.raises(DataError, match=r"take 9 x 32 x 48 or 5 x 32 x 48 or 5 x 48 x 32"):
        adapter.encode(clip(9, 48, 32)[None])


def test_clips_of_another_size_are_named_before_anything_is_encoded(folders, tmp_path):
    adapter = PLUGIN.adapter(ModelBundle({}), CONFIG, source=str(folders["t2v"]))
    adapter._codec.encode = None  # nobody asks it
    for number, size in enumerate([(8, 32, 48), (10, 32, 48), (9, 36, 36), (9, 48, 48)]):
        with (
            pytest.raises(DataError, match=r"^a: clips are .* and the models take 9 x 32 x 48"),
            ShardWriter(tmp_path / str(number)) as writer,
        ):
            preprocess([("a", "x", clip(*size))], adapter, writer, negative_prompt=None)


def test_the_family_says_what_data_are_made_of(folders):
    t2v, ti2v = str(folders["t2v"]), str(folders["ti2v"])
    assert PLUGIN.clip_shapes(CONFIG) == ((9, 32, 48),)
    assert PLUGIN.frame_rate(CONFIG, source=t2v) == 16
    assert PLUGIN.frame_rate(CONFIG, source=ti2v) == 24
    assert PLUGIN.frame_rate(CONFIG, source="Wan-AI/Wan2.2-TI2V-5B-Diffusers") == 24
    assert PLUGIN.frame_rate(CONFIG, source="./gone") is None
    tokens = PLUGIN.count_tokens(CONFIG, ["", "a", "a " * 20], source=t2v)
    assert tokens is not None
    assert tokens.limit == 6
    assert tokens.counts[0] < tokens.counts[1] <= 6 < tokens.counts[2]
    assert PLUGIN.count_tokens(CONFIG, [], source=t2v).counts == ()
    assert PLUGIN.count_tokens(CONFIG, ["a"], source="owner/not-here") is None


def test_components_run_where_the_bundle_says(folders):
    bundle = ModelBundle({}, device=torch.device("meta"))
    adapter = PLUGIN.adapter(bundle, CONFIG, source=str(folders["t2v"]))
    assert adapter._codec._device.type == "meta"
