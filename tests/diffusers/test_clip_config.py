"""One size of clips, or buckets of several, in ``pipeline_config``."""

from __future__ import annotations

import pytest
from attrs import asdict, evolve, frozen
from distill_diffusers.config import BucketConfig, ImageConfig, VideoConfig

SIZES = [(9, 32, 48), (1, 64, 64), (5, 48, 32), (8 + 1, 48, 32)]
BUCKETS = tuple(BucketConfig(num_frames=f, height=h, width=w) for f, h, w in SIZES)


@frozen(kw_only=True)
class Config(VideoConfig):
    """A family's own section."""

    length: int = 8


def test_the_largest_bucket_is_the_size_of_the_section():
    config = Config(buckets=BUCKETS, length=4)
    # Three latent frames of 32 x 48 = 4,608 pixels; the picture has 4,096.
    assert (config.num_frames, config.height, config.width) == (9, 32, 48)
    assert evolve(config, cfg_batched=False).height == 32
    bigger = Config(buckets=(*BUCKETS, BucketConfig(height=96, width=96)))
    assert (bigger.num_frames, bigger.height, bigger.width) == (1, 96, 96)


def test_each_bucket_gives_the_section_of_its_size():
    config = Config(buckets=BUCKETS, length=4)
    for bucket, (frames, height, width) in zip(BUCKETS, SIZES, strict=True):
        one = Config(num_frames=frames, height=height, width=width, length=4)
        assert config.of_bucket(bucket) == one
    picture = ImageConfig(buckets=(BucketConfig(height=32, width=32),))
    assert picture.of_bucket(picture.buckets[0]) == ImageConfig(height=32, width=32)


def test_what_was_saved_is_read_again():
    config = Config(buckets=BUCKETS)
    saved = asdict(config, recurse=False)
    assert Config(**saved) == config
    with pytest.raises(ValueError, match="48 beside buckets, of which the largest has 32"):
        Config(**{**saved, "height": 48})
    with pytest.raises(ValueError, match="13 beside buckets"):
        Config(buckets=BUCKETS, num_frames=13)


@pytest.mark.parametrize(
    ("bucket", "word"),
    [
        ({"height": 40, "width": 32}, "1 x 40 x 32: height 40 must be divisible by 16"),
        ({"height": 32, "width": 33}, "1 x 32 x 33: width 33 must be divisible by 16"),
        ({"height": 32, "width": 32, "num_frames": 8}, "8 x 32 x 32: num_frames 8 must be 4k"),
        ({"height": 32, "width": 48, "num_frames": 9}, "9 x 32 x 48 stands here twice"),
    ],
    ids=["height", "width", "frames", "twice"],
)
def test_a_wrong_bucket_is_named(bucket, word):
    with pytest.raises(ValueError, match=word):
        Config(buckets=(*BUCKETS, BucketConfig(**bucket)))


def test_a_size_is_needed_and_pictures_have_no_frames():
    with pytest.raises(ValueError, match="missing; write the size of the clips, or several under"):
        Config(num_frames=9, height=32)
    with pytest.raises(ValueError, match="num_frames 5 of an image model"):
        ImageConfig(buckets=(BucketConfig(height=32, width=32, num_frames=5),))
