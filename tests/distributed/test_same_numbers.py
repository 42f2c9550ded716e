"""One, two and four processes train alike: whole runs of the tiny Wan, forked ranks over gloo."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from app_ranks import assert_weights_alike, read_losses, read_weights, run_file, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

STEPS = 4
LOSS_TOLERANCE = 2e-4
"""Relative: sums over processes are taken in another order, and four updates carry it on."""

_BY_EXIT = "student_std/exit_"
"""A mean over clips that left there, of which each process has another number."""

_CANCELLING = ("student_mean", "gan_fake_logit", "gan_real_logit")


def run(
    folder: Path, name: str, size: int, distributed: dict[str, Any], method: str, **changes: Any
) -> Path:
    file = run_file(
        folder / f"{name}.yaml",
        method,
        **changes | {"training": changes.get("training", {}) | {"distributed": distributed}},
    )
    assert run_on_ranks(train, file, size=size) == [""] * size
    return folder / name


def assert_alike(one: Path, many: Path, *, ema: bool) -> None:
    a, b = read_losses(one), read_losses(many)
    assert a.keys() == b.keys()
    assert len(a) == STEPS
    for iteration in a:
        assert a[iteration].keys() == b[iteration].keys()
        for name, value in a[iteration].items():
            if name.startswith(_BY_EXIT):
                continue
            # A mean of what has both signs rounds as its addends, which are of size 1.
            least = LOSS_TOLERANCE if name in _CANCELLING else 1e-6
            assert b[iteration][name] == pytest.approx(value, rel=LOSS_TOLERANCE, abs=least), (
                iteration,
                name,
            )
    for averaged in (False, True)[: 1 + ema]:
        assert_weights_alike(read_weights(one, ema=averaged), read_weights(many, ema=averaged))


STRATEGIES = [
    (2, {"strategy": "ddp"}),
    (4, {"strategy": "ddp"}),
    (2, {"strategy": "fsdp2"}),
    (4, {"strategy": "fsdp2", "sync_every_micro_step": True}),
    (2, {"strategy": "hsdp", "shard_size": 1}),
    (4, {"strategy": "hsdp", "shard_size": 2}),
    (1, {"strategy": "fsdp2"}),
]
SHAPES = {
    "dmd2_every_step": (
        "dmd2",
        {
            "critic_update": "every_step", "generator_update_interval": 2, "critic_exits": True,
            "critic_interpolation": 0.1,
        },
    ),
    "dmd2_alternate": ("dmd2", {"critic_update": "alternate", "generator_update_interval": 2}),
    "dmd2_data": (
        "dmd2",
        {
            "rollout": "data", "generator_update_interval": 2, "critic_exits": True,
            "real_score_guidance_scale": [1.5, 1.0],
        },
    ),
    "dmd2_gan": ("dmd2_gan", {"generator_update_interval": 2, "f_divergence": "js"}),
    "ladd": ("ladd", {"generator_update_interval": 2, "rollout": "simulate"}),
    "finetune": ("finetune", {}),
    "self_forcing": (
        "self_forcing", {"generator_update_interval": 2, "same_step_across_chunks": False,
         "critic_exits": True}
    ),
    "causvid": ("causvid", {"generator_update_interval": 2}),
    "finetune_causal": ("finetune_causal", {}),
    "consistency": ("consistency", {}),
}  # fmt: skip


def train_shape(
    folder: Path,
    name: str,
    size: int,
    distributed: dict[str, Any],
    shape: str,
    accumulation: int,
    ema: bool,
) -> Path:
    method, options = SHAPES[shape]
    return run(
        folder,
        name,
        size,
        distributed,
        method,
        training={
            "max_train_steps": STEPS,
            "global_batch_size": 4 * accumulation,
            "batch_size_per_device": 4 // size,
        },
        method_config=options,
        callbacks={"ema": {"roles": ["student"], "decay": 0.5} if ema else None},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the run of one process, of which there is one a shape."""

    @functools.cache
    def folder(shape: str, accumulation: int, ema: bool) -> Path:
        base = tmp_path_factory.mktemp("alone")
        return train_shape(base, "one", 1, {}, shape, accumulation, ema)

    return folder


@pytest.mark.slow
@settings(max_examples=10)
@given(
    st.sampled_from(STRATEGIES),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([1, 3]),
    st.booleans(),
)
@example((2, {"strategy": "fsdp2"}), "dmd2_every_step", 3, True)
@example((2, {"strategy": "fsdp2"}), "dmd2_gan", 1, False)
def test_any_number_of_processes_gives_the_numbers_of_one(
    alone, strategy, shape, accumulation, ema
):
    assert_numbers_of_one(alone, strategy, shape, accumulation, ema)


@pytest.mark.parametrize(
    ("strategy", "shape", "accumulation", "ema"),
    [
        ((2, {"strategy": "ddp"}), "self_forcing", 3, False),
        ((4, {"strategy": "hsdp", "shard_size": 2}), "dmd2_alternate", 1, True),
    ],
)
def test_several_processes_give_the_numbers_of_one(alone, strategy, shape, accumulation, ema):
    assert_numbers_of_one(alone, strategy, shape, accumulation, ema)


def assert_numbers_of_one(alone, strategy, shape: str, accumulation: int, ema: bool) -> None:
    size, distributed = strategy
    with TemporaryDirectory() as name:
        many = train_shape(Path(name), "many", size, distributed, shape, accumulation, ema)
        assert_alike(alone(shape, accumulation, ema), many, ema=ema)
