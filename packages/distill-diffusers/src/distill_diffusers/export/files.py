"""Files and folders of an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from distill_protocols import OutputError, TensorInfo, WeightsError, WeightSource
from distill_runtime import (
    claim_folder,
    export_folder_problem,
    replace_folder,
    write_safetensors,
)
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from distill_diffusers.folders import DIFFUSERS_STEM


@contextmanager
def replace_export(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``, which takes its place when the block ends well.

    Raises:
        OutputError: ``folder`` holds something that is no export, another process writes it, or it
            cannot be written.
    """
    if problem := export_folder_problem(folder):
        raise OutputError(problem)
    try:
        with (
            claim_folder(folder.parent, folder.name),
            replace_folder(folder, only_writer=True) as stage,
        ):
            yield stage
    except OSError as error:
        raise OutputError(
            f"{folder} could not be written: {error}. Choose a folder where this user may write, "
            "with enough free space"
        ) from error


def write_weights(
    file: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write weights to a safetensors file, one tensor in memory at a time.

    Raises:
        WeightsError: a dtype that is no float of 16 bits or more: no model that is trained here
            has others, and readers would take 8-bit floats without their scales.
    """
    for name, info in infos.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise WeightsError(
                f"{name} is {info}; weights are written as floats of 16 bits or more only, because "
                "no model that is trained here has others. Give precision"
            )
    write_safetensors(file, infos, read, metadata=metadata)


def write_module(folder: Path, source: WeightSource, names: list[str], max_bytes: int) -> None:
    """Write a module's weights under the file names, and split as, ``save_pretrained`` does."""
    infos = source.describe()
    split = split_state_dict_into_shards_factory(
        {name: infos[name] for name in names},
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=DIFFUSERS_STEM + "{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, keys in split.filename_to_tensors.items():
        write_weights(
            folder / file, {key: infos[key] for key in keys}, lambda key: source.read([key])[key]
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{DIFFUSERS_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object that a person can read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
