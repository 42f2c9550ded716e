"""Fixtures of small data sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from distill_conditioning import DataConfig, LatentDataset
from toy_data import CountingEncoder, write_dataset


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture(scope="session")
def make_encoder() -> type[CountingEncoder]:
    return CountingEncoder


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    return write_dataset


@pytest.fixture(scope="session")
def dataset_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LatentDataset]:
    """Return ``dataset_of(n)``, which makes n samples in several shards, once for each n."""

    @functools.cache
    def build(samples: int, shuffle: bool = True, workers: int = 0) -> LatentDataset:
        folder = write_dataset(tmp_path_factory.mktemp("data"), samples)
        return LatentDataset(DataConfig(path=str(folder), shuffle=shuffle, workers=workers))

    return build
