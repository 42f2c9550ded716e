"""Conditions with a first frame: stored, read, dropped and checked by name."""

from __future__ import annotations

import contextlib

import pytest
import torch
from distill_conditioning import (
    DataConfig,
    LatentDataset,
    LatentLoader,
    SampleShape,
    ShardWriter,
    dataset_info,
    preprocess,
)
from distill_protocols import Condition, ConditioningError, DataError


def embedding(text):
    """[1, 3, 4]: another one for each text."""
    return torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(len(text) + ord(text[-1])))


class Pictured:
    """An adapter's encoding side; its condition of a first frame is the frame, flattened."""

    @property
    def images(self):
        return self

    def keep_encoders_loaded(self):
        return contextlib.nullcontext()

    def encode_condition(self, raw_cond):
        return Condition({"text": torch.cat([embedding(text) for text in raw_cond])})

    def encode_neg_condition(self, raw_neg_cond):
        return Condition({"text": torch.full((1, 3, 4), -1.0)})

    def latent_fingerprint(self):
        return {}

    def condition_fingerprint(self):
        return {"text_encoder.weights": "encoder"}

    def with_image(self, cond, images, frames=None):
        length = torch.full((len(images), 1), float(frames or 0))
        picture = torch.cat([images.flatten(1), length], dim=1)
        return Condition({"image_latents": picture}).merged_onto(cond)

    def encode(self, video):
        return video[:, :2, :, ::2, ::2]


def clips(count=6):
    """Yield clips with two captions in turn, each with a first frame of its own."""
    for i in range(count):
        video = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(i))
        yield f"clip-{i}", f"caption {i % 2}", video


@pytest.fixture
def folder(tmp_path):
    encoder = Pictured()
    with ShardWriter(tmp_path / "d", fingerprint=encoder.condition_fingerprint()) as writer:
        preprocess(clips(), encoder, writer, negative_prompt="", batch_size=4, first_frames=True)
    return tmp_path / "d"


def dataset(folder):
    return LatentDataset(DataConfig(path=str(folder), shuffle=False))


def test_clips_of_one_caption_keep_their_own_pictures(folder):
    stored = dataset(folder)
    [shape] = stored.sources[0].index.shapes
    assert shape.conditions == {"text": (3, 4), "image_latents": (49,)}
    cond = stored.read(torch.arange(6)).cond
    for i, (_, caption, video) in enumerate(clips()):
        picture, frames = cond.tensors["image_latents"][i].split([48, 1])
        assert torch.equal(picture, video[:, 0].flatten())
        assert frames == video.shape[1]
        assert torch.equal(cond.tensors["text"][i : i + 1], embedding(caption))
        assert stored.caption(i) == caption


def test_equal_conditions_are_still_stored_once(tmp_path):
    with ShardWriter(tmp_path / "d") as writer:
        for i in range(6):
            cond = Condition({"text": embedding("a"), "image": torch.full((1, 2), float(i % 2))})
            writer.add([str(i)], ["a"], torch.zeros(1, 2, 1, 2, 2), cond)
    shard = dataset(tmp_path / "d")._open(0)
    assert len(shard.captions) == 2
    assert shard.condition_id[:, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_a_dropped_caption_leaves_the_picture(folder):
    stored = dataset(folder)
    negative = stored.negative().condition
    assert set(negative.tensors) == {"text"}
    loader = LatentLoader(stored, batch_size=6, seed=0, dropout=1.0, negative=negative)
    batch = next(iter(loader))
    assert torch.equal(batch.cond.tensors["text"], negative.tensors["text"].expand(6, -1, -1))
    kept = stored.read(torch.arange(6)).cond.tensors["image_latents"]
    assert torch.equal(batch.cond.tensors["image_latents"], kept)


def test_a_negative_that_is_no_part_of_the_samples_is_refused(folder):
    stored = dataset(folder)
    for wrong in ({}, {"other": torch.zeros(1, 2)}, {"text": torch.zeros(1, 9, 4)}):
        with pytest.raises(ConditioningError):
            LatentLoader(stored, batch_size=2, seed=0, dropout=0.5, negative=Condition(wrong))


def reads(conditions):
    return [SampleShape(latents=None, conditions=conditions)]


def test_a_data_set_needs_the_condition_of_the_picture(folder, tmp_path):
    expected = {"image_latents": (49,)}
    assert dataset_info(folder, shapes=reads(expected)).problems == ()
    (problem,) = dataset_info(folder, shapes=reads({"image_latents": (50,)})).problems
    assert "[49]" in problem
    assert "[50]" in problem
    (problem,) = dataset_info(folder, shapes=reads({**expected, "image_embeds": (2, 2)})).problems
    assert "'image_embeds' is absent" in problem
    assert "first_frames=True" in problem


def test_pictures_are_of_one_size(tmp_path):
    writer = ShardWriter(tmp_path / "d")
    latents = torch.zeros(1, 2, 1, 2, 2)
    writer.add(["a"], ["x"], latents, Condition({"text": embedding("x"), "p": torch.zeros(1, 2)}))
    with pytest.raises(DataError, match="of one latent shape the same"):
        writer.add(
            ["b"], ["x"], latents, Condition({"text": embedding("x"), "p": torch.zeros(1, 3)})
        )


def test_one_condition_over_another():
    text, other = Condition({"text": torch.ones(2, 1)}), Condition({"text": torch.zeros(2, 1)})
    below = Condition({**other.tensors, "image": torch.full((2, 1), 5.0)})
    merged = text.merged_onto(below).tensors
    assert merged["text"].sum() == 2
    assert merged["image"].sum() == 10
