"""The data set against the models and the method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill_conditioning import DataConfig, DataInfo, SampleShape, data_info
from distill_protocols import ONE_TENSOR, Problem

from distill_runfile.draft import Draft
from distill_runfile.missing import data_key, made_by, missing_data
from distill_runfile.schema import clip_configs, components_source


def read_datasets(draft: Draft) -> DataInfo | None:
    """Read the indices of the data sets and compare them with what the models take; None: there
    are none.

    A plan may be made before the data are.
    """
    if draft.data is None or (draft.planning and missing_data(draft.data)):
        return None
    return describe_data(draft, draft.data)


def describe_data(draft: Draft, data: DataConfig) -> DataInfo:
    """Read the indices of ``data`` and compare them with what the run's models and its method
    take."""
    shapes: list[SampleShape] = []
    fingerprint = None
    method = None if draft.method is None else draft.method.config
    # A method that cannot read several parts is refused for that, and not for its data.
    reads_parts = method is not None and ONE_TENSOR not in method.capabilities
    if draft.family is not None and draft.roles:
        plugin = draft.family.plugin
        source = components_source(plugin, draft.family.config, draft.roles)
        fingerprint = plugin.fingerprint(draft.family.config, source=source) or None
        for config in clip_configs(plugin, draft.family.config):
            conditions: dict[str, tuple[int, ...]] = {}
            # Of roles, not of the components: it is the transformers that read conditions.
            for role in draft.roles.values():
                conditions = {
                    **plugin.condition_shapes(config, source=role.spec.path),
                    **conditions,
                }
            latents = plugin.latent_shape(config, source=source)
            parts = {}
            if latents is not None and reads_parts:
                parts = plugin.part_shapes(config, latents, source=source)
            shapes.append(SampleShape(latents=latents, conditions=conditions, parts=parts))
    return data_info(
        data,
        shapes=shapes,
        needs_latents=method is not None and method.needs_latents,
        times=() if method is None else method.trajectory_times,
        fingerprint=fingerprint,
    )


def check_data(draft: Draft) -> Iterator[Problem]:
    """Problems of the data sets, and a run that would write into the folder of one."""
    if draft.data is not None and draft.datasets is not None:
        for info in draft.datasets.sets:
            path, problems = str(info.path), info.problems
            if not info.path.exists() and (made := made_by(path, draft.document.main.file)):
                problems = (f"{path} is not there yet{made}",)
            yield from (Problem(data_key(draft.data, path), text) for text in problems)
        if not any(info.problems for info in draft.datasets.sets):
            yield from (Problem(("data", "sets"), text) for text in draft.datasets.problems)
    if draft.training is None:
        return
    output_dir = draft.training.output_dir
    if Path(output_dir).is_file():
        yield Problem(
            ("training", "output_dir"),
            f"{output_dir} is a file; a run writes many, into a folder of its own",
        )
    if draft.data is not None and output_dir in [one.path for one in draft.data.all_sets]:
        yield Problem(
            ("training", "output_dir"),
            f"{output_dir} is the data set's folder; a run writes into a folder of its own",
        )
