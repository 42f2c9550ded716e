"""Invariants 3, 5, 9, 10 and 11 over every method x {bidirectional, causal} x {one, two experts} x
{text, picture in channels, first frame}, batch 1 and more, on real (tiny) transformers.

Each property is drawn; what is drawn seldom, and all combinations once, are in the slow test.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import wan_variants
from attrs import evolve
from distill_protocols import (
    ContractError,
    RandomStreams,
    RowGenerators,
    SamplerSpec,
    SampleView,
    WeightAverage,
)
from distill_trainer import DistillTrainer, EmaCallback, EmaConfig, TrainingConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import CASES, PLACES, Setups, gradients, part, turns

places = st.sampled_from(PLACES)
seeds = st.integers(0, 2**31)
few = settings(max_examples=12)


@pytest.fixture(scope="module")
def worlds(folder_of):
    return Setups(folder_of)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    base, folders = tmp_path_factory.mktemp("variants"), {}
    template = wan_variants.template(base / "template")

    def folder(name):
        if name not in folders:
            folders[name] = wan_variants.build(name, template, base / name)
        return str(folders[name])

    return folder


class Calls:
    """Within: (role, module, t) of every call of a transformer."""

    def __init__(self, method):
        self._modules, self.calls = method.model_dict, []

    def __enter__(self):
        self._hooks = [
            module.register_forward_pre_hook(self._noted(key), with_kwargs=True)
            for key, module in self._modules.items()
            if hasattr(module, "patch_embedding")
        ]
        return self.calls

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _noted(self, key):
        def note(module, args, kwargs):
            self.calls.append((*key.split("."), kwargs["timestep"].flatten().tolist()))

        return note


def copies(modules):
    """Copy what ``load_state_dict`` of each role restores."""
    return {k: {n: t.clone() for n, t in m.state_dict().items()} for k, m in modules.items()}


def check_gradients(worlds, place, size, seed, iteration):
    method, batch = worlds.build(*place, seed=seed), worlds.batch(place[1], size)
    method.single_train_step(batch, iteration).loss_map["total_loss"].backward()
    grads = gradients(method)
    method.optimizers_zero_grad(iteration)
    reached = Counter(key.split(".")[0] for key in grads)
    assert reached.keys() == turns(method, iteration)
    for role, modules in reached.items():
        assert modules <= (CASES[place[0]].losses if role == "student" else 1)
    assert all(bool(value.any()) and bool(value.isfinite().all()) for value in grads.values())


@few
@given(place=places, size=st.sampled_from([1, 2, 3]), seed=seeds, iteration=st.integers(1, 4))
def test_5_gradients_reach_the_roles_of_the_turn_and_one_expert_of_each(
    worlds, place, size, seed, iteration
):
    check_gradients(worlds, place, size, seed, iteration)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_5_on_every_combination(worlds, place):
    for iteration in (1, 2):
        for size in (1, 2):
            check_gradients(worlds, place, size, 0, iteration)


matching = st.sampled_from([place for place in PLACES if CASES[place[0]].matches])


@few
@given(place=matching, seed=seeds, size=st.sampled_from([1, 2]))
def test_3_a_critic_equal_to_the_teacher_leaves_the_student_where_it_is(worlds, place, seed, size):
    """Its gradient is 0 to rounding: 1e-4 of what it is against another critic."""
    batch, (_, bundle) = worlds.batch(place[1], size), worlds(*place[1:])
    critic, teacher = bundle["critic"].modules, bundle["teacher"].modules
    norms, kept = [], copies(critic)
    try:
        for equal in (False, True):
            if equal:
                for key, module in critic.items():
                    module.load_state_dict(teacher[key].state_dict())
            step = worlds.build(*place, seed=seed, real_score_guidance_scale=1.0)
            step.single_train_step(batch, 2).loss_map["total_loss"].backward()
            grads = gradients(step)
            norms.append(sum(v.norm() for k, v in grads.items() if k.startswith("student.")))
            step.optimizers_zero_grad(2)
    finally:
        for key, module in critic.items():
            module.load_state_dict(kept[key])
    assert norms[0] > 0
    assert norms[1] <= 1e-4 * norms[0]


@few
@given(place=places, seed=seeds, iteration=st.sampled_from([2, 3]))
def test_11_accumulation_is_one_large_batch_and_a_batch_its_samples(worlds, place, seed, iteration):
    """Of one expert, whatever the number of micro steps: never a part of the batch for each."""
    full, seen = worlds.batch(place[1], 2), []
    for size in (2, 1):
        method = worlds.build(*place, seed=seed, **CASES[place[0]].one_exit)
        for start in range(0, 2, size):
            micro = part(full, slice(start, start + size))
            loss = method.single_train_step(micro, iteration).loss_map["total_loss"]
            (loss * size / 2).backward()
        seen.append(gradients(method))
        method.optimizers_zero_grad(iteration)
    large, small = seen
    assert large.keys() == small.keys()
    for key, value in large.items():
        scale = value.abs().max()
        assert torch.allclose(value, small[key], rtol=2e-3, atol=2e-4 * float(scale)), key


@few
@given(
    place=places,
    interval=st.sampled_from([1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
    seed=seeds,
)
def test_11_schedules_optimizers_and_averages_of_an_expert_count_alike(
    worlds, place, interval, accumulation, seed, tmp_path_factory
):
    options = {}
    if CASES[place[0]].matches:
        options = {"generator_update_interval": interval, "critic_update": "every_step"}
    method, batch = worlds.build(*place, seed=seed, **options), worlds.batch(place[1], 1)
    before = copies(method.model_dict)
    training = TrainingConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), max_train_steps=4,
        global_batch_size=accumulation, batch_size_per_device=1, trackers=(), progress=False,
    )  # fmt: skip
    roles = tuple(sorted({role for i in range(1, 5) for role in turns(method, i)}))
    averages = EmaCallback(EmaConfig(roles=roles, decay=0.5))
    try:
        result = DistillTrainer(training, callbacks=[averages], trackers=[]).run(method, [batch])
        for role in roles:
            handle = method.bundle[role]
            counts = {key: result.updates[f"{role}.{key}"] for key in handle.modules}
            turns_taken = sum(role in turns(method, i) for i in range(1, 5))
            most = turns_taken * (CASES[place[0]].losses if role == "student" else 1)
            assert turns_taken <= sum(counts.values()) <= most
            for key, count in counts.items():
                assert handle.schedulers[key].last_epoch == count
                average: WeightAverage = handle.ema[key]
                assert average.updates == count
                steps = {int(s["step"]) for s in handle.optimizers[key].state.values()}
                assert steps == ({count} if count else set())
        for key, module in method.model_dict.items():
            still = all(torch.equal(t, before[key][n]) for n, t in module.state_dict().items())
            assert still == (result.updates.get(key, 0) == 0), key
    finally:
        for key, module in method.model_dict.items():
            module.load_state_dict(before[key])


@few
@given(place=places, seed=seeds, iteration=st.integers(1, 4), size=st.sampled_from([1, 2]))
def test_9_10_ranks_make_the_same_calls_each_of_one_expert_with_noise_of_their_own(
    worlds, place, seed, iteration, size
):
    """Also the same number of calls, and of the same modules: a sharded role would wait else."""
    seen, shown = [], []
    for rank in range(2):
        streams = RandomStreams(seed, rank=rank, world_size=2)
        method = worlds.build(*place, streams=streams)
        with Calls(method) as calls:
            result = method.single_train_step(worlds.batch(place[1], size), iteration)
        seen.append([(role, module) for role, module, _ in calls])
        shown.append(result.outputs["student_x0"])
        adapter = method.adapter
        if "experts" in place[1]:
            boundary = 1000 * {"t2v-experts": 0.875, "i2v-experts": 0.9}[place[1]]
            for role, module, times in calls:
                if place[2] == "causal" and role == "student":
                    # What is clean (or nearly so) is past, for whichever expert.
                    context = method.config.student_sampler.context_noise
                    times = [t for t in times if t > context]
                assert {t >= boundary for t in times} <= {module == "transformer"}
                assert not times or adapter.expert_of(role, torch.tensor(times)) == module
    assert seen[0] == seen[1]
    assert not torch.equal(shown[0], shown[1])


specs = st.builds(
    SamplerSpec,
    steps=st.integers(1, 4),
    shift=st.sampled_from([1.0, 3.0, 8.0]),
    stochastic=st.booleans(),
    context_noise=st.sampled_from([0.0, 90.0]),
) | st.builds(
    SamplerSpec,
    steps=st.just(2),
    timesteps=st.sampled_from([(1000.0, 700.0), (950.0, 300.0)]),
    stochastic=st.booleans(),
)
kinds = st.sampled_from(sorted({place[1:] for place in PLACES}))


@torch.no_grad()
@few
@given(kind=kinds, spec=specs, guidances=st.sampled_from([(1, None), (2, None), (0, None), (2, 1)]),
       seed=seeds, size=st.sampled_from([1, 2]))  # fmt: skip
def test_one_sampler_serves_rollouts_and_validation(worlds, kind, spec, guidances, seed, size):
    """A rollout to the last step is the sampler, and a validation clip is the sampler's, bit for
    bit; guided, it is the walk by hand (1e-5)."""
    (adapter, _), (variant, student) = worlds(*kind), kind
    high, low = guidances
    if low is not None and "experts" not in variant:
        low = None
    spec = evolve(spec, guidance=float(high), guidance_2=low)
    method = worlds.build("finetune", variant, student, student_sampler=spec)
    cond = worlds.batch(variant, size).cond

    def rows():
        return RowGenerators.of_clips(seed, range(size))

    generators = rows()
    noise = generators.normal(adapter.latent_shape)
    negative = method.conditioning.negative() if spec.guided else None
    clip = adapter.sample("student", spec, noise, cond, neg_cond=negative, generators=generators)
    (shown,) = method.sample_for_logging(
        [SampleView(name="student", role="student")], cond, seed=seed
    ).values()
    assert torch.equal(shown, adapter.decode(clip))
    if spec.guided:
        with pytest.raises(ContractError, match="one call of two"):
            adapter.rollout("student", spec, noise, cond, exit_steps=[0])
    else:
        generators = rows()
        generators.normal(adapter.latent_shape)
        exit_steps = [spec.steps - 1] * len(adapter.chunks("student"))
        rolled = adapter.rollout(
            "student", spec, noise, cond, exit_steps=exit_steps, generators=generators
        )
        assert torch.equal(rolled, clip)
    if student != "bidirectional":
        return  # by hand in test_causal_sampling and test_flow_map
    draws, x = rows(), noise
    draws.normal(adapter.latent_shape)
    boundary = {"t2v-experts": 875, "i2v-experts": 900}.get(variant, 0)
    sigmas = [*spec.sigmas(), 0.0]
    for s, after in itertools.pairwise(sigmas):
        w = spec.guidances[1000 * s < boundary]
        t = torch.full((size,), 1000 * s)
        v = adapter.forward("student", x, t, cond, neg_cond=negative, cfg=w)
        if spec.stochastic and after > 0:
            x = (1 - after) * (x - s * v) + after * draws.normal(adapter.latent_shape)
        else:
            x = x + (after - s) * v
    trained = adapter.trained_frames(cond)
    keep = slice(None) if trained is None else slice(1, None)
    assert torch.allclose(clip[:, :, keep], x[:, :, keep], atol=2e-5)
