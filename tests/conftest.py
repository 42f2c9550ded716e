"""What holds for every test: offline, two threads at most, one hypothesis profile."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# Whoever compiles torch, diffusers and transformers first keeps the bytecode: without it each
# worker, fork server and app that a test starts compiles them again, which takes it seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Derandomised, so that a red test stays red until it is mended; no deadline, as boxes are shared.
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def autograd_starts_without_devices() -> None:
    """Let autograd count devices before the first fake tensor, which registers one of CUDA.

    It would start a thread for that device, and no forked child could differentiate any more.
    """
    import torch

    torch.ones((), requires_grad=True).backward()
