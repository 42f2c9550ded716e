"""A model call: batches, guidance, gradients, inputs that do not fit, global state."""

from __future__ import annotations

import torch
from attrs import evolve
from distill_protocols import Condition, ConditioningError, SamplerSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_conformance.adapter_case import ROWS, AdapterCase, normal, row_generators
from distill_conformance.failures import (
    REFUSALS,
    applies_if,
    must_raise,
    require,
    require_equal,
    require_shape,
)

FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None)


def check_outputs(case: AdapterCase) -> None:
    """A prediction is fp32, of the shape of x_t, finite, and the same in a second call.

    Losses are taken of it as it is.
    """
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        for t in case.times(role):
            v = _call(case, role, x_t, t, cond)
            require_shape(v, tuple(x_t.shape), f"a prediction of {role!r}")
            require(v.dtype == torch.float32, f"a prediction of {role!r} is {v.dtype}, not fp32")
            require(bool(v.isfinite().all()), f"a prediction of {role!r} is not finite")
            require_equal(_call(case, role, x_t, t, cond), v, f"two equal calls of {role!r}")


def check_inputs_are_kept(case: AdapterCase) -> None:
    """A call writes into none of its inputs.

    Methods call several roles with the same x_t, and condition tensors belong to a data set.
    """
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        for t in case.times(role):
            before = [x.clone() for x in (x_t, t, *cond.tensors.values())]
            _call(case, role, x_t, t, cond)
            for tensor, copy in zip((x_t, t, *cond.tensors.values()), before, strict=True):
                require_equal(tensor, copy, f"an input of {role!r} before and after a call")


def check_model_reads_its_inputs(case: AdapterCase) -> None:
    """x_t, t and the prompt each change the prediction.

    Otherwise one of them is not passed on, and training teaches the model to do without.
    """
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        for t in case.times(role):
            v = _call(case, role, x_t, t, cond)
            for what, other in {
                "x_t": _call(case, role, case.noise(seed=9), t, cond),
                "t": _call(case, role, x_t, t.flip(0), cond),
                "the condition": _call(case, role, x_t, t, _reversed(cond)),
            }.items():
                require(not torch.equal(v, other), f"{what} has no effect on role {role!r}")


def check_batch_invariance(case: AdapterCase) -> None:
    """A batch of two gives what two batches of one give, with and without guidance.

    Otherwise results depend on the batch size, and samples leak into each other.
    """
    cond, x_t = case.condition(), case.noise()
    guided = not case.capabilities.missing(["supports_cfg"])
    options = [{}, {"cfg": 3.0, "neg_cond": case.negative}] if guided else [{}]
    for role in case.model_roles:
        for t in case.times(role):
            for option in options:
                both = _call(case, role, x_t, t, cond, **option)
                for i in range(ROWS):
                    row = slice(i, i + 1)
                    alone = _call(case, role, x_t[row], t[row], cond[row], **option)
                    case.require_close(
                        both[row], alone, f"row {i} of {role!r} in a batch and alone ({option})"
                    )


def check_guidance(case: AdapterCase) -> None:
    """w = 1 is the conditional prediction, w = 0 the unconditional one, ``u + w (c - u)`` between.

    Otherwise a guidance scale of a paper means something else here. A family that combines
    otherwise (``AdapterCase.linear_guidance``) must keep both ends.
    """
    case.need("supports_cfg")
    cond, x_t = case.condition(), case.noise()
    negative = case.negative
    full = negative.expand(ROWS).merged_onto(cond)
    for role in case.model_roles:
        for t in case.times(role):
            conditional = _call(case, role, x_t, t, cond)
            unconditional = _call(case, role, x_t, t, full)

            def at(w: float, role: str = role, t: Tensor = t) -> Tensor:
                return _call(case, role, x_t, t, cond, cfg=w, neg_cond=negative)

            case.require_close(at(1.0), conditional, f"guidance 1 of {role!r}")
            case.require_close(at(0.0), unconditional, f"guidance 0 of {role!r}")
            if case.linear_guidance:
                _require_linear(case, at, conditional, unconditional)


def _require_linear(case: AdapterCase, at, conditional: Tensor, unconditional: Tensor) -> None:
    @FEW
    @given(w=st.floats(0.25, 8.0))
    def check(w: float) -> None:
        expected = unconditional + w * (conditional - unconditional)
        case.require_close(at(w), expected, f"guidance {w:g}, u + w (c - u)")

    check()


def check_guidance_needs_a_negative(case: AdapterCase) -> None:
    """Guidance without a negative condition raises ``ConditioningError``.

    Otherwise it silently has no effect.
    """
    case.need("supports_cfg")
    role = case.model_roles[0]
    with must_raise(ConditioningError, "guidance 3 without neg_cond"):
        _call(case, role, case.noise(), case.times(role)[0], case.condition(), cfg=3.0)


def check_gradients(case: AdapterCase) -> None:
    """A loss reaches all trained weights that were called, nothing frozen, and x_t.

    Otherwise a part of a model silently never learns, or a frozen one collects gradients. A
    generator learns through the x_t of frozen roles.
    """
    cond = case.condition()
    for role in case.model_roles:
        for t in case.times(role):
            with case.clean_gradients():
                x_t = case.noise().requires_grad_()
                v = case.adapter.forward(role, x_t, t, cond)
                require(v.requires_grad, f"a prediction of {role!r} has no gradient to its input")
                v.square().mean().backward()
                require(
                    x_t.grad is not None and bool(x_t.grad.abs().sum() > 0),
                    f"no gradient reaches the x_t of role {role!r}",
                )
                _require_reached(case, role)


def _require_reached(case: AdapterCase, role: str) -> None:
    for name, handle in case.bundle.roles.items():
        called = []
        for key, module in handle.modules.items():
            trained = handle.trained_parameters(key) if name == role else {}
            reached = {n for n, p in module.named_parameters() if p.grad is not None}
            stray = sorted(reached - trained.keys())
            require(not stray, f"a call of {role!r} gives {name}.{key} a gradient in {stray[:4]}")
            missed = sorted(
                n for n in trained.keys() - reached if not n.endswith(tuple(case.unread_parameters))
            )
            if reached:
                called.append(key)
                require(not missed, f"no gradient reaches {missed[:4]} of {name}.{key}")
        expected = name == role and handle.trainable
        require(bool(called) == expected, f"a loss on {role!r} reaches modules {called} of {name}")


def check_no_gradient_modes(case: AdapterCase) -> None:
    """Under ``torch.no_grad`` no graph is kept, and a frozen role has none for plain inputs.

    Otherwise memory grows with every call of a teacher.
    """
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        t = case.times(role)[0]
        require(
            not _call(case, role, x_t, t, cond).requires_grad, f"{role!r} has a graph under no_grad"
        )
        if not case.bundle[role].trainable:
            v = case.adapter.forward(role, x_t, t, cond)
            require(not v.requires_grad, f"a call of the frozen role {role!r} keeps a graph")


def check_prediction_types(case: AdapterCase) -> None:
    """Predictions of all stated types are the same prediction.

    Otherwise a loss on x0 trains another model than one on v.
    """
    cond, x_t = case.condition(), case.noise()
    weight = _predicted(case, cond)
    for role in case.model_roles:
        for t in case.times(role):
            x0 = {
                kind: weight
                * case.adapter.pred_to_x0(
                    _call(case, role, x_t, t, cond, fwd_pred_type=kind), x_t, t, kind
                )
                for kind in sorted(case.capabilities.supported_pred_types)
            }
            first = next(iter(x0))
            for kind, value in x0.items():
                case.require_close(value, x0[first], f"x0 of {role!r} by {kind} and by {first}")


def check_sixteen_bits(case: AdapterCase) -> None:
    """A frozen role whose weights are stored in bf16 predicts what it does in fp32, but for
    rounding.

    Otherwise teachers, which are loaded so to save memory, raise or mix types in step 1.
    """
    cond, x_t = case.condition(), case.noise()
    spec = case.trained_role
    narrow = case.load_with(evolve(spec, trainable=False, precision="bf16"), perturb=False)
    wide = case.load_with(evolve(spec, trainable=False), perturb=False)
    t = case.times(spec.name)[0]
    with torch.no_grad():
        rounded, exact = (
            loaded.adapter.forward(spec.name, x_t, t, cond) for loaded in (narrow, wide)
        )
    error = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    require(error < 0.1, f"in bf16 {spec.name!r} is off by {error:.2g} of its output's rms")


def check_wrong_inputs(case: AdapterCase) -> None:
    """Inputs of a wrong shape or dtype are refused by whoever checks them (``REFUSALS``).

    A t that was rounded to 16 bits gives other noise levels without any sign; a shape that
    broadcasts mixes rows.
    """
    cond, x_t = case.condition(), case.noise()
    role = case.model_roles[0]
    t = case.times(role)[0]
    for what, wrong in {
        "t of three rows for two": torch.cat([t, t[:1]]),
        "t as a column": t[:, None, None],
        "t in bf16": t.to(torch.bfloat16),
        "t as integers": t.long(),
    }.items():
        with must_raise(REFUSALS, f"a call with {what}"):
            _call(case, role, x_t, wrong, cond)
    shape = case.adapter.latent_shape
    for what, noise in {
        "one channel too many": normal(ROWS, shape[0] + 1, *shape[1:]),
        "another height": normal(ROWS, *shape[:2], shape[2] + 2, shape[3]),
    }.items():
        with must_raise(REFUSALS, f"sampling from noise of {what}"):
            case.adapter.sample(role, SamplerSpec(steps=1), noise, cond)


def check_global_random_state(case: AdapterCase) -> None:
    """Loading, calling, encoding and sampling draw nothing from the global generator.

    Otherwise a run cannot be resumed bit for bit, and another batch size gives other noise.
    """
    state = torch.get_rng_state()

    def require_untouched(action: str) -> None:
        require(
            torch.equal(torch.get_rng_state(), state),
            f"{action} draws from the global random generator",
        )

    case.load(case.roles, perturb=False)
    require_untouched("loading")
    cond, noise = case.condition(), case.noise()
    require_untouched("encoding a condition")
    for role in case.model_roles:
        _call(case, role, noise, case.times(role)[0], cond)
        require_untouched(f"a call of {role!r}")
        case.adapter.sample(
            role, SamplerSpec(steps=2, stochastic=True), noise, cond, generators=row_generators()
        )
        require_untouched(f"sampling {role!r}")


def _predicted(case: AdapterCase, cond: Condition) -> Tensor:
    """1 where the model predicts; 0 where the condition gives a frame."""
    images = case.adapter.images
    mask = None if images is None else images.trained_frames(cond)
    return torch.ones(1) if mask is None else mask


def _reversed(cond: Condition) -> Condition:
    return Condition({name: value.flip(0) for name, value in cond.tensors.items()})


@torch.no_grad()
def _call(
    case: AdapterCase, role: str, x_t: Tensor, t: Tensor, cond: Condition, **options
) -> Tensor:
    applies_if(bool(case.model_roles), "the case has no role that is a model")
    return case.adapter.forward(role, x_t, t, cond, **options)
