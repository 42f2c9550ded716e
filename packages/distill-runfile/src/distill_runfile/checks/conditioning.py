"""The negative condition, for everyone who needs one."""

from __future__ import annotations

from collections.abc import Iterator

from distill_protocols import Problem

from distill_runfile.draft import Draft


def check_conditioning(draft: Draft) -> Iterator[Problem]:
    """Who needs a negative condition where there is none."""
    if draft.has_negative is not False:
        prompts = () if draft.datasets is None else draft.datasets.negative_prompts
        stated = draft.conditioning is None or draft.conditioning.negative_prompt is not None
        if len(prompts) > 1 and not stated and any(_reasons(draft)):
            yield Problem(
                ("conditioning", "negative_prompt"),
                f"missing, and the data sets have different ones "
                f"({', '.join(map(repr, prompts))}); one stands for all samples. Write the one "
                "that is meant",
            )
        return
    for reason in _reasons(draft):
        yield Problem(
            ("conditioning", "negative_prompt"),
            f"there is none, neither here nor in the data set, but {reason}. Write the prompt "
            'here ("" is Diffusers\' default), or preprocess the data set with one',
        )


def _reasons(draft: Draft) -> Iterator[str]:
    guided = draft.method is not None and draft.method.config.needs_negative
    if draft.method is not None and guided and not draft.capabilities.embeds_guidance:
        name = draft.method.plugin.name
        yield f"{name} guides a model, u + w (c - u), and u is its prediction for it"
    if draft.conditioning is not None and draft.conditioning.drops:
        yield "conditioning.dropout puts it in a caption's place"
