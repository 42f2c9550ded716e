"""Conditions: complete, row for row, and refused where a part is missing."""

from __future__ import annotations

import torch
from distill_protocols import Condition, ConditioningError

from distill_conformance.adapter_case import ROWS, AdapterCase
from distill_conformance.failures import applies_if, must_raise, require, require_shape


def check_condition_shapes(case: AdapterCase) -> None:
    """``condition_shapes`` states what an encoded condition holds, row for row.

    A data set is checked against it; a tensor that it leaves out is missing in the first step.
    """
    cond = case.condition()
    require(len(cond) == ROWS, f"a condition of {ROWS} prompts has {len(cond)} rows")
    for spec in case.roles:
        if spec.heads is not None:
            continue
        shapes = case.plugin.condition_shapes(case.config, source=spec.path)
        missing = sorted(shapes.keys() - cond.tensors.keys())
        require(not missing, f"condition_shapes names {missing}, which no encoded condition has")
        for name, shape in shapes.items():
            require_shape(
                cond.tensors[name], (ROWS, *shape), f"{name!r} of an encoded condition, [B, *row]"
            )


def check_conditions_row_by_row(case: AdapterCase) -> None:
    """A row of a condition does not depend on the others, and prompts give different rows.

    Otherwise a cached embedding is another than a fresh one.
    """
    cond = case.condition()
    for i in range(ROWS):
        alone = case.adapter.encode_condition([case.prompts[i]])
        for name, value in alone.tensors.items():
            case.require_close(
                cond.tensors[name][i : i + 1], value, f"{name!r} of prompt {i} in a batch and alone"
            )
    require(
        any(not torch.equal(value[0], value[1]) for value in cond.tensors.values()),
        f"the prompts {case.prompts} give the same condition",
    )
    negative = case.negative
    require(len(negative) == 1, f"a negative condition has one row, not {len(negative)}")


def check_missing_condition(case: AdapterCase) -> None:
    """A condition without one of its tensors raises ``ConditioningError`` that names it.

    Otherwise a data set of another family ends in a ``KeyError`` in step 1.
    """
    role = case.model_roles[0]
    cond, t = case.condition(), case.times(role)[0]
    shapes = case.plugin.condition_shapes(case.config, source=case.spec(role).path)
    applies_if(bool(shapes), "the family states no condition tensors")
    for name in shapes:
        # Of another family: it has as many rows, and not that tensor.
        others = {k: v for k, v in cond.tensors.items() if k != name}
        less = Condition({**others, "of_another_family": torch.zeros(ROWS, 1)})
        with must_raise(ConditioningError, f"a call without the condition tensor {name!r}"):
            case.adapter.forward(role, case.noise(), t, less)


def check_negative_is_merged(case: AdapterCase) -> None:
    """What a negative condition does not hold is that of the condition, such as a picture.

    Otherwise a negative prompt takes the picture away, or is refused.
    """
    case.need("supports_cfg")
    cond, negative = case.condition(), case.negative
    for role in case.model_roles:
        t = case.times(role)[0]
        with torch.no_grad():
            guided = case.adapter.forward(role, case.noise(), t, cond, cfg=0.0, neg_cond=negative)
            full = negative.expand(ROWS).merged_onto(cond)
            plain = case.adapter.forward(role, case.noise(), t, full)
        case.require_close(guided, plain, f"a negative condition of {role!r} merged onto cond")


def check_encoders(case: AdapterCase) -> None:
    """Fingerprints are stable and need no weights, and a kept encoder encodes as a fresh one.

    Cached embeddings are used while the fingerprint is the same, and a data set is compared with
    what the plugin states before any adapter is there.
    """
    fingerprint = case.adapter.condition_fingerprint()
    latents = case.adapter.latent_fingerprint()
    for name, value in {**latents, **fingerprint}.items():
        require(
            all(isinstance(text, str) and bool(text) for text in (name, value)),
            f"the fingerprint has the entry {name!r}: {value!r}; both are texts",
        )
    require(not latents.keys() & fingerprint.keys(), "latents and conditions share entries")
    require(case.adapter.condition_fingerprint() == fingerprint, "two fingerprints differ")
    require(
        case.plugin.fingerprint(case.config, source=case.components) == {**latents, **fingerprint},
        "the plugin's fingerprint is not that of its adapter",
    )
    fresh = case.adapter.encode_condition(case.prompts)
    with case.adapter.keep_encoders_loaded():
        kept = [case.adapter.encode_condition(case.prompts) for _ in range(2)]
    for again in kept:
        for name, value in fresh.tensors.items():
            case.require_close(again.tensors[name], value, f"{name!r} of a kept encoder")
    after = case.adapter.condition_fingerprint()
    require(not fingerprint or after == fingerprint, "encoding changes the fingerprint")
