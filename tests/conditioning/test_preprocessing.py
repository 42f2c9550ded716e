"""From clips to a data set that a run can read."""

from __future__ import annotations

import pytest
import torch
from distill_conditioning import DataConfig, LatentDataset, SampleShape, ShardWriter, preprocess
from distill_protocols import DataError


def _clips(count: int):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        yield f"clip-{i}", f"word {i % 3}", torch.rand(3, 1, 4, 4, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_clip_arrives_with_its_caption(tmp_path, encoder, batch_size):
    with ShardWriter(tmp_path, shard_bytes=200, latent_dtype="float32") as writer:
        count = preprocess(
            _clips(10), encoder, writer, negative_prompt="ugly", batch_size=batch_size
        )
    dataset = LatentDataset(
        DataConfig(path=str(tmp_path), verify="full"),
        shapes=[SampleShape(latents=(2, 1, 2, 2), conditions={"text": (3, 4)})],
    )
    assert count == len(dataset) == 10
    assert encoder.loads == 1
    batch = dataset.read(torch.arange(10))
    for i, (name, caption, video) in enumerate(_clips(10)):
        assert batch.ids[i] == name
        assert torch.equal(batch.latents[i], encoder.encode(video[None])[0])
        text = encoder.encode_condition([caption]).tensors["text"]
        assert torch.equal(batch.cond.tensors["text"][i], text[0])
    stored = dataset.negative()
    assert stored is not None
    assert stored.prompt == "ugly"
    assert dataset.sources[0].index.fingerprint == {
        "text_encoder.weights": "encoder-a",
        "vae.weights": "vae-a",
    }
    negative = encoder.encode_neg_condition("ugly").tensors["text"]
    assert torch.equal(stored.condition.tensors["text"], negative)


@pytest.mark.parametrize(
    ("clip", "word"),
    [
        (("bad", "c", torch.full((3, 1, 4, 4), 255.0)), r"bad.*\[255, 255\].*255"),
        (("bad", "c", torch.full((3, 1, 4, 4), float("nan"))), r"bad.*nan"),
        (("bad", "c", torch.zeros(1, 3, 4, 4)), r"bad.*\[3, F, H, W\]"),
        (("clip-1", "c", torch.zeros(3, 1, 4, 4)), "clip-1.*two clips"),
        (("bad", None, torch.zeros(3, 1, 4, 4)), "bad: its caption is None"),
    ],
)
def test_a_bad_clip_is_named_and_leaves_no_data_set(tmp_path, encoder, clip, word):
    with (
        pytest.raises(DataError, match=word),
        ShardWriter(tmp_path, shard_bytes=1) as writer,
    ):
        preprocess([*_clips(4), clip], encoder, writer, negative_prompt=None, batch_size=1)
    assert not (tmp_path / "index.json").exists()


def test_a_clip_of_another_size_in_a_batch_is_named(tmp_path, encoder):
    clips = [*_clips(2), ("other", "c", torch.zeros(3, 1, 8, 4))]
    with (
        pytest.raises(DataError, match=r"^other: video is \[3, 1, 8, 4\] and clip-0 is"),
        ShardWriter(tmp_path) as writer,
    ):
        preprocess(clips, encoder, writer, negative_prompt=None, batch_size=8)
    assert encoder.calls == []


def test_the_writer_must_note_the_encoder_that_is_used(tmp_path, encoder):
    writer = ShardWriter(tmp_path, fingerprint={"text_encoder.weights": "encoder-b"})
    with pytest.raises(DataError, match=r"text_encoder\.weights was encoder-b and is encoder-a"):
        preprocess(_clips(1), encoder, writer, negative_prompt=None)


def test_a_part_that_is_downloaded_meanwhile_is_recorded_too(tmp_path, make_encoder):
    late = make_encoder(None)
    encode = late.encode

    def download_and_encode(video):
        late.fingerprint = "encoder-a"
        return encode(video)

    late.encode = download_and_encode
    with ShardWriter(tmp_path) as writer:
        preprocess(_clips(1), late, writer, negative_prompt=None)
    index = LatentDataset(DataConfig(path=str(tmp_path))).sources[0].index
    assert index.fingerprint["text_encoder.weights"] == "encoder-a"
