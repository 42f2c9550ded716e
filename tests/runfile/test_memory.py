"""The memory plan: against what is really held, and against runs whose files were changed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import yaml
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_protocols import ConfigError, FsdpPolicy, RoleSpec, TensorPlan
from distill_runfile.cli import EXIT_INCOMPLETE
from distill_runfile.planning.memory import Planner, TensorTotals, shard_numel
from distill_runfile.planning.suggestions import Change, _descent, fitting, suggestions
from distill_runfile.planning.text import memory_sections
from distill_runfile.read import read_config
from distill_train.cli import main
from hypothesis import given
from hypothesis import strategies as st
from memory_ranks import planned_and_held

ROOT = Path(__file__).resolve().parents[2]
WAN_14B = ROOT / "configs" / "wan" / "dmd2_14b.yaml"


@pytest.fixture
def mixed(values):
    """Return a trained role, a frozen one in 16 bits, and one that trains adapters."""
    values["models"]["teacher"]["precision"] = "bf16"
    values["models"]["critic"] |= {"lora": {"rank": 4}}
    values["method_config"]["critic_update"] = "alternate"
    values["callbacks"]["ema"]["roles"] = ["student", "critic"]
    return values


def assert_close(sizes) -> None:
    for key, (planned, measured) in sizes.items():
        for part, size in measured.items():
            assert planned[part] == pytest.approx(size, rel=0.02), (key, part)


def test_one_process_holds_what_is_planned(mixed, write):
    sizes = planned_and_held(write(mixed), ("none",), rank=0)
    assert_close(sizes)
    assert sizes["none", "student"][1]["optimizer"] > 8e6
    assert sizes["none", "critic"][1]["ema"] == sizes["none", "critic"][1]["gradients"] > 0


def test_each_of_two_processes_holds_what_is_planned(mixed, write):
    from ranks import run_on_ranks

    ranks = run_on_ranks(planned_and_held, write(mixed), ("ddp", "fsdp2"))
    for sizes in ranks:
        assert isinstance(sizes, dict), sizes
        assert_close(sizes)
    full, half = ranks[0]["ddp", "student"][1], ranks[0]["fsdp2", "student"][1]
    assert half["optimizer"] < 0.55 * full["optimizer"]


# -- arithmetic -----------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), width=st.integers(1, 5), shards=st.integers(1, 70))
def test_shards_add_up_to_the_tensor(rows, width, shards):
    import torch

    tensor = TensorPlan(name="w", shape=(rows, width), dtype=torch.float32)
    sizes = [shard_numel(tensor, shards, rank) for rank in range(shards)]
    chunks = [c.numel() for c in torch.empty(rows, width).chunk(shards)]
    assert sizes == chunks + [0] * (shards - len(chunks))


def test_of_two_experts_one_is_called_at_a_time():
    """Wan 2.2's are each what the large Wan 2.1 is."""
    clip, policy = WanPipelineConfig(num_frames=81, height=480, width=832), FsdpPolicy()

    def sums(model: str) -> TensorTotals:
        role = RoleSpec(name="student", path=f"Wan-AI/{model}-Diffusers", trainable=True)
        return TensorTotals.of(PLUGIN.plan(role, clip), shards=4, rank=0, own=True)

    one, both = sums("Wan2.1-T2V-14B"), sums("Wan2.2-T2V-A14B")
    assert both.weights == 2 * one.weights == 2 * both.called
    assert both.gradients == 2 * one.gradients
    assert both.gathered(policy) == 2 * one.gathered(policy)
    assert both.gathered(policy, at_once=2) == one.gathered(policy, at_once=2)
    assert both.gradients_of_a_block(policy) == one.gradients_of_a_block(policy)


CALLS: dict[Any, Any] = {}
"""Plans of calls, which many of these tests need alike."""


def planner_of(world_size: int) -> Planner:
    return Planner(world_size=world_size, calls=CALLS)


def planned(values: dict[str, Any], write, world_size: int = 4) -> Any:
    return planner_of(world_size).run(read_config(write(values), world_size=world_size))


def test_strategies_and_policies(values, write):
    def roles(**changes: Any):
        changed = copy.deepcopy(values)
        changed["training"]["distributed"] = changes.pop("distributed", {})
        for role, keys in changes.items():
            changed["models"][role] |= keys
        return planned(changed, write).roles

    fsdp2 = {"strategy": "fsdp2"}
    ddp, quarter = roles(), roles(distributed=fsdp2)
    half = roles(distributed={"strategy": "hsdp", "shard_size": 2})
    weights = [m["student"].device.weights for m in (ddp, half, quarter)]
    assert weights[0] > 1.7 * weights[1] > 2.5 * weights[2]
    assert ddp["teacher"].called == 0 < quarter["teacher"].called < quarter["student"].called

    gradients = [ddp[name].device.gradients for name in ("student", "critic")]
    assert gradients[0] == gradients[1] > 0

    only_teacher = roles(teacher={"fsdp": {}})
    assert only_teacher["teacher"].device.weights == quarter["teacher"].device.weights
    kept_whole = roles(distributed=fsdp2, teacher={"fsdp": {"shard": False}})
    assert kept_whole["teacher"].device == ddp["teacher"].device
    gathered = roles(distributed=fsdp2, teacher={"fsdp": {"reshard_after_forward": False}})
    assert gathered["teacher"].device.weights > ddp["teacher"].device.weights

    away = roles(distributed=fsdp2, student={"fsdp": {"cpu_offload": True}})["student"]
    assert away.host.total == pytest.approx(quarter["student"].device.total, rel=0.03)
    assert away.device.total < 0.05 * away.host.total  # buffers
    waiting = roles(teacher={"offload": True})["teacher"]
    assert waiting.host.weights == waiting.called > 0

    narrow = roles(
        distributed=fsdp2,
        student={"precision": "bf16", "fsdp": {"mixed_precision": "bf16"}},
    )
    assert narrow["student"].called < quarter["student"].called


def test_ddp_has_each_gradient_once_and_in_its_role_s_iterations_alone(values, write):
    alone = planned(values | {"training": values["training"] | {"global_batch_size": 2}}, write, 1)
    values["training"] |= {"batch_size_per_device": 1, "global_batch_size": 8}
    run = planned(values, write)  # two micro steps of four processes
    critic = run.roles["critic"].device.gradients
    assert critic == alone.roles["critic"].device.gradients > 0
    gradients = {turn.roles: turn.gradients for turn in run.turns}
    assert gradients == {("critic",): critic, ("student", "critic"): 2 * critic}


def test_whole_gradients_wait_for_the_last_micro_step(values, write):
    values["training"] |= {"batch_size_per_device": 1, "distributed": {"strategy": "fsdp2"}}
    once = planned(values, write).roles["student"].device
    values["training"]["global_batch_size"] = 8
    twice = planned(values, write).roles["student"].device
    assert twice.gradients > 3.5 * once.gradients
    values["training"]["distributed"]["sync_every_micro_step"] = True
    assert planned(values, write).roles["student"].device == once


def test_a_shared_base_is_counted_once(values, write):
    values["models"]["student"] = {"base": "teacher", "lora": {"rank": 2}}
    memory = planned(values, write, world_size=1)
    student, teacher = memory.roles["student"].device, memory.roles["teacher"].device
    assert student.weights == student.gradients == student.ema == student.optimizer // 2
    assert student.weights < 0.1 * teacher.weights


def test_moments_and_averages(values, write):
    values["training"]["optimizer"]["name"] = "sgd"
    del values["callbacks"]["ema"], values["checkpoint"]["export"]
    device = planned(values, write).roles["student"].device
    assert device.optimizer == device.ema == 0 < device.gradients


def test_turns(values, write):
    memory = planned(values, write)
    alone, both = memory.turns
    assert (alone.roles, both.roles) == (("critic",), ("student", "critic"))
    roles = memory.roles
    assert alone.kept == roles["critic"].call.held
    # The critic's losses are differentiated before the student's turn begins.
    assert both.kept == max(alone.kept, roles["student"].call.held)
    assert both.largest_call == max(r.in_a_call for r in roles.values())
    assert memory.peak == both.total


# -- what would help ------------------------------------------------------------------------------


def add_line(values: dict[str, Any], line: str) -> dict[str, Any]:
    """Write a suggested line into ``values``, as a user would."""
    changed = copy.deepcopy(values)
    where, _, text = line.partition(": ")
    replaces = text.endswith(", in place of path")
    value = yaml.safe_load(text.removesuffix(", in place of path"))
    *above, last = where.split(".")
    place = changed
    for key in above:
        place = place.setdefault(key, {})
    if replaces:
        value |= {k: v for k, v in place[last].items() if k not in ("path", "precision", "fsdp")}
    elif isinstance(value, dict):
        value = {**place.get(last, {}), **value}
    place[last] = value
    return changed


def test_each_suggestion_saves_the_stated_bytes(values, write):
    values["training"] |= {"global_batch_size": 32, "batch_size_per_device": 4}
    # The larger turn decides: of two alike, checkpointing one saves nothing.
    values["models"]["critic"]["activation_checkpointing"] = True
    config = read_config(write(values), world_size=4)
    planner = planner_of(4)
    before = planner.run(config).peak
    suggested = suggestions(config, planner)
    kinds = " ".join(s.line for s in suggested)
    for kind in ("fsdp2", "teacher.fsdp.shard", "activation_checkpointing", "per_device: 2",
                 "base: teacher"):  # fmt: skip
        assert kind in kinds
    for suggestion in suggested:
        changed = add_line(values, suggestion.line)
        assert before - planned(changed, write).peak == suggestion.saves > 0, suggestion.line


@pytest.mark.parametrize("share_of_peak", [0.8, 0.5, 0.3])
def test_the_plan_suggests_the_fewest_lines_that_fit(values, write, share_of_peak):
    values["training"] |= {"global_batch_size": 32, "batch_size_per_device": 4}
    for role in values["models"].values():
        role["precision"] = "bf16"
    config = read_config(write(values), world_size=4)
    planner = planner_of(4)
    size = int(planner.run(config).peak * share_of_peak)
    changes = fitting(config, planner, size)
    assert changes is not None

    def peak(lines) -> int:
        changed = values
        for line in lines:
            changed = add_line(changed, line)
        try:
            return planned(changed, write).peak
        except ConfigError:  # some lines are only allowed beside others
            return 10**18

    assert peak(changes.lines) == changes.memory.peak <= size
    for fewer in itertools.combinations(changes.lines, len(changes.lines) - 1):
        assert peak(fewer) > size


def test_the_plan_reports_that_no_suggestion_is_enough(values, write):
    config = read_config(write(values), world_size=4)
    sections = dict(memory_sections(config, planner_of(4), 10**6))
    lines = "\n".join(sections["on a device of 1.0 MB"])
    assert "does not fit" in lines
    assert "training.distributed: {strategy: fsdp2}" in lines
    assert "not even all of this together is enough" in lines


def test_a_fitting_run_gets_no_suggestion(values, write, capsys):
    argv = ["--config", str(write(values)), "--dry-run", "--device-memory", "24GiB"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "on a device of 25.8 GB\n  fits: 25." in out
    assert "would help" not in out


def test_suggestions_made_needless_by_a_later_one_are_left_out():
    """a saves most at first, b and c do it together without a."""
    peaks = {"": 100, "a": 60, "b": 70, "c": 80, "ab": 55, "ac": 58, "bc": 20, "abc": 18}
    changes = [Change(line=name, apply=lambda config: config) for name in "abc"]

    def tried(some: Any) -> Any:
        return SimpleNamespace(peak=peaks["".join(c.line for c in some)])

    kept = _descent(changes, tried, 20)
    assert kept is not None
    assert kept.lines == ("b", "c")
    assert _descent(changes, tried, 17) is None


# -- the command line -----------------------------------------------------------------------------


def test_the_batch_of_so_many_processes(values, write, capsys, monkeypatch):
    values["training"] |= {"global_batch_size": 12, "batch_size_per_device": 2}
    path = write(values)

    def run(*more: str) -> int:
        return main(["--config", str(path), "--dry-run", *more])

    assert run("--world-size", "3") == 0
    assert "12 a step = 2 a device x 2 micro steps x 3 devices" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run() == 0
    assert "2 a device x 3 micro steps x 2 devices" in capsys.readouterr().out
    assert run("--world-size", "4") == 2
    message = capsys.readouterr().err
    assert "training.batch_size_per_device: 12 samples" in message
    assert "= 1.5 micro steps" in message
    line = int(message.split("run.yaml:")[1].split(":")[0])
    assert "batch_size_per_device" in path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("distributed", "word"),
    [
        ({"strategy": "none"}, "each would be a run of its own"),
        ({"strategy": "hsdp", "shard_size": 3}, "1.33 groups"),
    ],
)
def test_strategies_that_do_not_go_with_the_processes(values, write, capsys, distributed, word):
    values["training"]["distributed"] = distributed
    assert main(["--config", str(write(values)), "--dry-run", "--world-size", "4"]) == 2
    assert word in capsys.readouterr().err


def test_a_trained_role_is_not_sharded_under_ddp(values, write, capsys):
    values["models"]["student"]["fsdp"] = {"shard": True}
    assert main(["--config", str(write(values)), "--dry-run", "--world-size", "2"]) == 2
    assert "models.student.fsdp: 'student' is trained under strategy ddp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--world-size", "0"], ["--device-memory", "80 apples"], ["--device-memory", "0GB"]]
)
def test_flags_that_are_no_number(values, write, flags):
    with pytest.raises(SystemExit) as excinfo:
        main(["--config", str(write(values)), "--dry-run", *flags])
    assert excinfo.value.code == 2


def test_flags_of_a_plan_go_with_a_plan(values, write, capsys):
    with pytest.raises(SystemExit) as excinfo:
        main(["--config", str(write(values)), "--world-size", "2"])
    assert excinfo.value.code == 2
    assert "go with --dry-run" in capsys.readouterr().err


# -- a large model --------------------------------------------------------------------------------


def test_a_plan_of_three_14b_roles_takes_no_memory(capsys):
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    argv = ["--config", str(WAN_14B), "--dry-run", "--world-size", "64", "--device-memory", "80GB"]
    assert main(argv) == EXIT_INCOMPLETE
    assert _status("VmHWM") - before < 300e6  # one block of it has 1.4e9 bytes
    out = capsys.readouterr().out
    assert out.count("14,288,491,584") == 3
    assert "fits:" in out


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in text.splitlines() if x.startswith(key)).split()[1])


def test_plans_of_calls_are_made_once(values, write):
    """Two roles that are built and called alike need one plan, whatever they are called."""
    calls = []

    class Counting:
        def __init__(self, family: Any) -> None:
            self._family = family

        def plan(self, spec, pipeline):
            return self._family.plan(spec, pipeline)

        def components(self, pipeline):
            return self._family.components(pipeline)

        def plan_call(self, spec, *args, **keys):
            calls.append(spec)

    config = read_config(write(values))
    memory = Planner().run(attrs.evolve(config, family_plugin=Counting(config.family_plugin)))
    assert len(calls) == 2
    assert memory.roles["student"].call is None
    assert memory.roles["student"].activations == 0
