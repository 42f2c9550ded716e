"""Exact resume, and the refusal of checkpoints that are not this run's."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from distill_checkpoint import CheckpointConfig, CheckpointManager, StoredCheckpoint
from distill_checkpoint.tensors import read_tensors
from distill_protocols import Callback, CheckpointError, NonFiniteLossError, RunState
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import Run, Shape, new_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESUME = CheckpointConfig(resume="latest")
PARAMETERS = [f"{i}.{name}" for i in (0, 1, 4) for name in ("weight", "bias")]


def find_differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Find the paths where two states differ in type, dtype or any bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{path}: keys {sorted(map(str, set(a) ^ set(b)))}"]
        return [line for key in a for line in find_differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in find_differences(x, y, f"{path}.{i}")]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{path}: tensors"]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def manager(folder: Path, config: CheckpointConfig | None = None) -> CheckpointManager:
    return CheckpointManager(config or CheckpointConfig(), folder, {"a": [1, None, "x"]})


def saved(folder: Path, shape: Shape | None = None, steps: int = 3) -> Run:
    run = new_run(shape or Shape())
    run.train(folder, steps, manager(folder))
    return run


def resume(folder: Path, shape: Shape | None = None, seed: int = 1) -> tuple[Run, int]:
    run = new_run(shape or Shape(), seed=seed)
    for callback in run.callbacks.values():
        callback.on_train_start(run.state(folder, 0))
    return run, manager(folder, RESUME).resume(run.state(folder, 0), run.callbacks)


@given(
    n=st.integers(1, 5),
    m=st.integers(1, 5),
    shape=st.builds(
        Shape,
        interval=st.integers(1, 3),
        accumulation=st.integers(1, 3),
        ema_roles=st.sampled_from([(), ("student",), ("critic", "student")]),
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
        width=st.integers(2, 6),
        trained=st.none() | st.sets(st.sampled_from(PARAMETERS), min_size=1).map(frozenset),
    ),
    every=st.integers(1, 5),
    in_background=st.booleans(),
)
@example(
    n=4, m=4, every=1, in_background=False,
    shape=Shape(precision="fp16", accumulation=2, ema_roles=("critic",)),
)  # fmt: skip
@example(n=5, m=3, every=1, in_background=True, shape=Shape(trained=frozenset({"4.weight"})))
def test_n_steps_save_load_m_steps_is_n_plus_m_steps(n, m, shape, every, in_background):
    with TemporaryDirectory() as name:
        folder = Path(name)
        full = new_run(shape)
        full.train(folder, n + m)
        config = CheckpointConfig(every_steps=every, async_save=in_background)
        new_run(shape).train(folder, n, manager(folder, config))
        # Other weights, and other draws made, before the resume: all of it must be overwritten.
        resumed = new_run(shape, seed=1)
        resumed.method.streams.get("tiny.student").seed()
        resumed.train(folder, n + m, manager(folder, RESUME))
        assert resumed.method.update_counts == full.method.update_counts
        assert find_differences(full.everything(), resumed.everything()) == []


def test_a_checkpoint_changes_nothing_in_the_run_that_saves_it(tmp_path):
    quiet, noisy = new_run(Shape()), new_run(Shape(), seed=0)
    torch.manual_seed(0)
    quiet.train(tmp_path / "quiet", 6)
    torch.manual_seed(0)
    noisy.train(tmp_path / "noisy", 6, manager(tmp_path / "noisy", CheckpointConfig(every_steps=1)))
    assert find_differences(quiet.everything(), noisy.everything()) == []


def test_moments_of_bf16_weights_keep_fp32(tmp_path):
    def build() -> Run:
        run = new_run(Shape(ema_roles=()))
        module = run.method.bundle["critic"].modules["transformer"].bfloat16()
        optimizer = run.method.bundle["critic"].optimizers["transformer"]
        for parameter in module.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.rand(parameter.shape) / 3
        return run

    run, other = build(), build()
    manager(tmp_path).save(run.state(tmp_path, 1), run.callbacks)
    manager(tmp_path, RESUME).resume(other.state(tmp_path, 0), other.callbacks)
    # Not optimizer.state_dict(), which hides where torch has rounded.
    kept, back = (
        [s["momentum_buffer"] for s in r.method.optimizer_dict["critic.transformer"].state.values()]
        for r in (run, other)
    )
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(kept, back, strict=True))


def test_tied_weights_are_saved_and_stay_tied(tmp_path):
    def build() -> Run:
        run = new_run(Shape(ema_roles=()))
        layers = run.method.bundle["critic"].modules["transformer"]
        layers.extra = torch.nn.Linear(4, 6)
        layers.extra.weight = layers[0].weight
        parameters = layers.parameters()
        run.method.bundle["critic"].optimizers["transformer"] = torch.optim.SGD(parameters, lr=0.1)
        del run.method.bundle["critic"].schedulers["transformer"]
        return run

    run, other = build(), build()
    with torch.no_grad():
        run.method.bundle["critic"].modules["transformer"].extra.weight.fill_(7.0)
    manager(tmp_path).save(run.state(tmp_path, 1), run.callbacks)
    manager(tmp_path, RESUME).resume(other.state(tmp_path, 0), other.callbacks)
    layers = other.method.bundle["critic"].modules["transformer"]
    assert layers.extra.weight is layers[0].weight
    assert layers[0].weight.eq(7).all()


def test_a_frozen_base_is_not_saved(tmp_path):
    shape = Shape(trained=frozenset({"4.weight"}))
    saved(tmp_path, shape)
    stored = StoredCheckpoint.open(tmp_path / "checkpoint-000003")
    for ema in (False, True):
        info = stored.weights("student", ema=ema)["transformer"].describe()
        assert set(info) == {
            "4.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked",
        }  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"0\.bias, 4\.bias is in the run but not in the checkp"
    ):
        resume(tmp_path, Shape(trained=frozenset({"4.weight", "4.bias", "0.bias"})))


def test_a_shared_base_is_neither_saved_nor_loaded(tmp_path):
    def build(base: float) -> tuple[Run, torch.nn.Parameter]:
        run = new_run(Shape(trained=frozenset({"4.weight"})))
        roles = run.method.bundle.roles
        weight = roles["teacher"].modules["transformer"][0].weight
        for module in roles["student"].modules.values():
            module[0].weight = weight
        with torch.no_grad():
            weight.fill_(base)
        return run, weight

    run, _ = build(5.0)
    manager(tmp_path).save(run.state(tmp_path, 1), run.callbacks)
    other, weight = build(7.0)
    manager(tmp_path, RESUME).resume(other.state(tmp_path, 0), other.callbacks)
    assert weight.eq(7).all()
    for module in other.method.bundle["student"].modules.values():
        assert module[0].weight is weight
    saved_tensors = read_tensors(tmp_path / "checkpoint-000001/roles/student/transformer")
    assert [name for name in saved_tensors if name.endswith("weight")] == ["4.weight"]


@pytest.mark.parametrize(
    "role", ["a/b", "../../../x", "a.b", "", "%2E", "ä ö", "shard.safetensors"]
)
def test_any_string_is_a_role_and_stays_inside_the_folder(tmp_path, role):
    shape = Shape(extra_roles=(role,))
    run = saved(tmp_path / "out", shape)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    resumed, _ = resume(tmp_path / "out", shape)
    assert find_differences(run.everything()["weights"], resumed.everything()["weights"]) == []


def test_only_trainable_roles_are_saved(tmp_path):
    saved(tmp_path)
    roles = {path.name for path in (tmp_path / "checkpoint-000003" / "roles").iterdir()}
    assert roles == {"student", "critic"}


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        (Shape(extra_roles=("reward",)), Shape(), "reward.transformer is in the checkpoint but"),
        (Shape(), Shape(extra_roles=("reward",)), "reward.transformer is in the run but"),
        (Shape(callbacks=("a", "b")), Shape(callbacks=("a",)), "callback b is in the checkpoint"),
        (Shape(callbacks=("a",)), Shape(callbacks=("a", "b")), "callback b is in the run but"),
        (Shape(), Shape(ema_roles=()), "EMA student.transformer, student.transformer_2 is in the"),
        (Shape(ema_roles=()), Shape(), "student.transformer_2 is in the run but"),
        (Shape(width=6), Shape(width=5), r"0.weight is \[6, 4\] float32 in the checkpoint and"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path, then, now, named):
    saved(tmp_path, then)
    run = new_run(now, seed=1)
    for callback in run.callbacks.values():
        callback.on_train_start(run.state(tmp_path, 0))
    before = copy.deepcopy(run.everything())
    with pytest.raises(CheckpointError, match=named):
        manager(tmp_path, RESUME).resume(run.state(tmp_path, 0), run.callbacks)
    assert find_differences(run.everything(), before) == []


def test_other_dtype_is_refused_rather_than_rounded(tmp_path):
    saved(tmp_path, Shape(ema_roles=()))
    run = new_run(Shape(ema_roles=()))
    run.method.bundle["critic"].modules["transformer"].bfloat16()
    with pytest.raises(CheckpointError, match=r"float32 in the checkpoint and \[6, 4\] bfloat16"):
        manager(tmp_path, RESUME).resume(run.state(tmp_path, 0), run.callbacks)


def test_optimizer_groups_that_moved_are_refused(tmp_path):
    saved(tmp_path)
    run = new_run(Shape(), seed=1)
    role = run.method.bundle["critic"]
    parameters = list(role.modules["transformer"].parameters())
    role.optimizers["transformer"] = torch.optim.SGD(parameters[::-1], lr=0.1, momentum=0.9)
    run.callbacks["ema"].on_train_start(run.state(tmp_path, 0))
    with pytest.raises(CheckpointError, match=r"critic.transformer has groups of other parameters"):
        manager(tmp_path, RESUME).resume(run.state(tmp_path, 0), run.callbacks)


def test_latest_in_an_empty_folder_starts_afresh_and_logs_it(tmp_path, caplog):
    _, iteration = resume(tmp_path / "new")
    assert iteration == 0
    assert "starts afresh" in caplog.text


def test_a_path_resumes_from_another_folder(tmp_path):
    run = saved(tmp_path / "old")
    config = CheckpointConfig(resume=str(tmp_path / "old" / "checkpoint-000003"))
    other = new_run(Shape(), seed=1)
    other.train(tmp_path / "new", 3, manager(tmp_path / "new", config))
    assert find_differences(run.everything(), other.everything()) == []
    assert (tmp_path / "new" / "checkpoint-000003" / "manifest.json").exists()


def test_a_renamed_checkpoint_is_saved_again_under_its_own_name(tmp_path):
    saved(tmp_path)
    source = (tmp_path / "checkpoint-000003").rename(tmp_path / "good")
    config = CheckpointConfig(resume=str(source))
    new_run(Shape(), seed=1).train(tmp_path, 3, manager(tmp_path, config))
    assert resume(tmp_path)[1] == 3  # else 'latest' would start afresh


@pytest.mark.parametrize("start", ["none", "checkpoint-000002"])
def test_starting_before_what_the_folder_holds_is_refused(tmp_path, start):
    run = new_run(Shape())
    run.train(tmp_path, 4, manager(tmp_path, CheckpointConfig(every_steps=2)))
    source = start if start == "none" else str(tmp_path / start)
    other = new_run(Shape(), seed=1)
    with pytest.raises(CheckpointError, match="already holds checkpoint-000004"):
        other.train(tmp_path, 6, manager(tmp_path, CheckpointConfig(resume=source)))


@pytest.mark.parametrize(
    ("config", "steps", "stop", "expected"),
    [
        (CheckpointConfig(), 5, None, {5}),
        (CheckpointConfig(save_at_end=False), 5, None, set()),
        (CheckpointConfig(every_steps=2, save_at_end=False), 5, None, {2, 4}),
        (CheckpointConfig(every_steps=2), 4, None, {2, 4}),
        (CheckpointConfig(save_at_end=False), 5, 3, {3}),
    ],
)
def test_saves_happen_at_their_iterations(tmp_path, caplog, config, steps, stop, expected):
    run = new_run(Shape())
    if stop:
        run.callbacks["tally"].on_step_start = lambda state: (
            state.request_stop("asked to") if state.iteration == stop else None
        )
    caplog.set_level(logging.INFO)
    run.train(tmp_path, steps, manager(tmp_path, config))
    assert caplog.text.count("saved ") == len(expected)  # and none of them twice
    assert {int(path.name[-6:]) for path in tmp_path.glob("checkpoint-*")} == expected


def test_weights_behind_a_loss_that_is_not_finite_are_not_saved(tmp_path):
    run = new_run(Shape())
    state = run.state(tmp_path, 2)

    def check() -> None:
        raise NonFiniteLossError(2, {"total_loss": float("nan")}, [])

    state.check_finite = check
    with pytest.raises(NonFiniteLossError):
        manager(tmp_path).save(state, run.callbacks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    run = saved(tmp_path)
    with torch.no_grad():
        run.method.bundle["student"].modules["transformer_2"][0].bias[1] = value
    with pytest.raises(CheckpointError, match=r"student\.transformer_2: 0\.bias \(1 tensors\)"):
        manager(tmp_path).save(run.state(tmp_path, 4), run.callbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000003"]


def file_of(lr: float = 1e-4, schedule: str = "constant", **training: Any) -> dict[str, Any]:
    optimizer = {"lr": lr, "betas": [0.0, 0.99], "schedule": {"name": schedule}}
    return {
        "models": {
            "student": {"path": "/a", "optimizer": optimizer},
            "teacher": {"path": "/b", "optimizer": None},
        },
        "training": {"max_train_steps": 3, "optimizer": {"lr": 1e-5}, **training},
        "checkpoint": {"resume": "none"},
    }


def resume_with(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> Run:
    run = new_run(Shape())
    run.train(folder, 3, CheckpointManager(CheckpointConfig(), folder, then))
    other = new_run(Shape(), seed=1)
    for callback in other.callbacks.values():
        callback.on_train_start(other.state(folder, 0))
    before = copy.deepcopy(other.everything())
    try:
        CheckpointManager(RESUME, folder, now).resume(other.state(folder, 0), other.callbacks)
    except CheckpointError:
        assert find_differences(other.everything(), before) == []
        raise
    return other


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (file_of(lr=2e-4), r"models\.student\.optimizer\.lr is 0\.0001 in the .* and 0\.0002 now"),
        (file_of(schedule="cosine"), r"student\.optimizer\.schedule\.name is 'constant' in"),
    ],
)
def test_other_optimizer_settings_are_refused_with_both_values(tmp_path, now, named):
    with pytest.raises(CheckpointError, match=f"{named}.*Put the old ones back, or start"):
        resume_with(tmp_path, file_of(), now)


def test_other_changes_are_logged_one_line_each(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    then, now = file_of(schedule="cosine"), file_of(schedule="cosine", seed=2)
    now["training"]["max_train_steps"] = 9
    now["models"]["teacher"]["path"] = "/c"
    now["checkpoint"]["resume"] = "latest"
    resume_with(tmp_path, then, now)
    assert [record.getMessage() for record in caplog.records] == [
        "resuming checkpoint-000003: models.teacher.path is '/b' in the checkpoint and '/c' now",
        "resuming checkpoint-000003: training.max_train_steps is 3 in the checkpoint and 9 now; "
        "the cosine schedule now ends at the new end, so the learning rate jumps here",
        "resuming checkpoint-000003: training.seed is absent in the checkpoint and 2 now",
    ]


def test_state_that_is_neither_tensor_nor_json_is_refused_by_name(tmp_path):
    run = new_run(Shape())
    run.callbacks["tally"].state_dict = lambda: {"seen": {"ids": {1, 2}}}
    with pytest.raises(CheckpointError, match=r"callbacks/tally: seen\.ids is a set"):
        run.train(tmp_path, 1, manager(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_config_that_is_not_json_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        CheckpointManager(CheckpointConfig(), tmp_path, {"path": Path("/x")})


def test_the_log_names_saved_and_resumed_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    saved(tmp_path)
    resume(tmp_path)
    assert "saved" in caplog.text
    assert "iteration 3 is done" in caplog.text


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, and that are not views of others."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if is_own(a)}
        for tensor in filter(is_own, tree_leaves(out)):
            if tensor.untyped_storage().data_ptr() not in known:
                self.total += tensor.untyped_storage().nbytes()
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def is_own(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def test_a_resume_allocates_the_moments_and_nothing_else_of_their_size(tmp_path):
    shape = Shape(width=20_000, ema_roles=("critic", "student"))
    saved(tmp_path, shape, steps=4)
    run = new_run(shape, seed=1)
    for callback in run.callbacks.values():
        callback.on_train_start(run.state(tmp_path, 0))
    with Allocated() as allocated:
        manager(tmp_path, RESUME).resume(run.state(tmp_path, 0), run.callbacks)
    moments = sum(
        value.nbytes
        for optimizer in run.method.optimizer_dict.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    assert moments > 3_000_000
    # What is left over are generators' states, and not one more weight, average or moment.
    assert moments <= allocated.total < moments + 100_000


def test_micro_steps_are_counted_through_a_resume(tmp_path):
    class Count(Callback):
        name = "count"
        micro_steps = 0

        def on_train_end(self, run: RunState) -> None:
            self.found = run.micro_steps

    def trained(accumulation: int, steps: int) -> int:
        run = new_run(Shape(accumulation=accumulation))
        count = run.callbacks["count"] = Count()
        run.train(tmp_path, steps, manager(tmp_path, RESUME))
        return count.found

    assert trained(2, 3) == 6
    assert trained(3, 5) == 6 + 2 * 3
