"""Tensors of which no process holds a shard: they are what they are, and are fetched in order."""

from __future__ import annotations

import torch
from distill_runtime import fetch_floats, full_tensor, is_sharded, local_shard
from torch import Tensor, nn


class Named(Tensor):
    """A type of tensor that this framework does not know."""


def test_plain_tensors_are_no_shards():
    for value in (torch.ones(2), nn.Parameter(torch.ones(2)), torch.ones(2).as_subclass(Named)):
        assert is_sharded(value) is False
        assert local_shard(value) is value
        assert full_tensor(value) is value
    assert fetch_floats([torch.tensor(1.5), 2, torch.tensor(3)]) == [1.5, 2.0, 3.0]
