"""The data set against the models and the method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill_conditioning import DatasetInfo, dataset_info
from distill_protocols import Problem

from distill_runfile.draft import Draft
from distill_runfile.missing import made_by
from distill_runfile.schema import components_source


def read_dataset(draft: Draft) -> DatasetInfo | None:
    """Read the data set's index and compare it with what the models take; None: there is none.

    A plan may be made before the data are.
    """
    if draft.data is None or (draft.planning and not Path(draft.data.path).exists()):
        return None
    latent_shape, fingerprint = None, None
    condition_shapes: dict[str, tuple[int, ...]] = {}
    if draft.family is not None and draft.roles:
        plugin, config = draft.family.plugin, draft.family.config
        source = components_source(plugin, config, draft.roles)
        latent_shape = plugin.latent_shape(config, source=source)
        fingerprint = plugin.fingerprint(config, source=source) or None
        # Of roles, not of the components: it is the transformers that read conditions.
        for role in draft.roles.values():
            shapes = plugin.condition_shapes(config, source=role.spec.path)
            condition_shapes = {**shapes, **condition_shapes}
    times = () if draft.method is None else draft.method.config.trajectory_times
    return dataset_info(
        draft.data.path,
        latent_shape=latent_shape,
        condition_shapes=condition_shapes,
        times=times,
        fingerprint=fingerprint,
        accept=draft.data.accept,
    )


def check_data(draft: Draft) -> Iterator[Problem]:
    """Problems of the data set, and a run that would write into its folder."""
    if draft.data is not None and draft.dataset is not None:
        made = ""
        if not Path(draft.data.path).exists():
            made = made_by(draft.data.path, draft.document.main.file)
        problems = draft.dataset.problems
        for message in [f"{draft.data.path} is not there yet{made}"] if made else problems:
            yield Problem(("data", "path"), message)
    if draft.training is None:
        return
    output_dir = draft.training.output_dir
    if Path(output_dir).is_file():
        yield Problem(
            ("training", "output_dir"),
            f"{output_dir} is a file; a run writes many, into a folder of its own",
        )
    if draft.data is not None and output_dir == draft.data.path:
        yield Problem(
            ("training", "output_dir"),
            f"{output_dir} is the data set's folder; a run writes into a folder of its own",
        )
