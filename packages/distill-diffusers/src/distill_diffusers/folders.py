"""Diffusers-format folders and hub ids, examined without torch: what is there and what is not.

::

    model_index.json
    transformer/    config.json, diffusion_pytorch_model.safetensors (or shards and their index)
    transformer_2/  likewise, where the model has two experts
    vae/            likewise
    text_encoder/   config.json, model.safetensors (or shards)    only to encode new prompts
    tokenizer/      tokenizer.json, spiece.model ...               likewise
    text_encoder_2/, tokenizer_2/ ...                              likewise, of further encoders
    image_encoder/  config.json, model.safetensors (or shards)    only to encode new images
    image_processor/  preprocessor_config.json (or feature_extractor/)    likewise
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distill_protocols import WeightsError
from distill_runtime import UnreadableFileError, path_inside, read_header, read_json_object

from distill_diffusers.model_configs import read_config

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that can be trained from, by safetensors' names."""
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
"""One of these is in a tokenizer's folder, unless its words are bytes."""
IMAGE_PROCESSORS = ("image_processor", "feature_extractor")
"""Folders that an image encoder's processor may have."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Return whether ``path`` reads as ``owner/name`` and is no folder here: one that exists is
    meant."""
    if not _HUB_ID.fullmatch(path):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:  # such as models/wan--x: the cache's own names have the two dashes
        return False
    return not Path(path).is_dir()


def portable_name(path: str) -> str:
    """Return what says on another machine as well which model ``path`` is: its hub id, also of a
    folder in a hub's cache, or else the name of its folder."""
    if is_hub_id(path):
        return path
    parts = Path(path).parts
    cached = [part for part in parts if part.startswith("models--") and part.count("--") == 2]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else parts[-1]


def cached_snapshot(hub_id: str) -> Path | None:
    """Return the folder of ``hub_id`` in the local Hugging Face cache, if it was ever
    downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def locate(path: str) -> Path | None:
    """Return the folder of ``path``, a folder or a hub id, on this machine; None where there is
    none."""
    if is_hub_id(path):
        return cached_snapshot(path)
    return Path(path) if Path(path).is_dir() else None


def fetch(path: str, subfolders: tuple[str, ...]) -> Path:
    """Return the local folder of ``path``; a hub id is downloaded (only ``subfolders``) where it
    may be.

    Raises:
        WeightsError: no such folder, or the download failed; the message shows how to get it.
    """
    if not is_hub_id(path):
        if not Path(path).is_dir():
            raise WeightsError(_no_folder(path))
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *[f"{name}/*" for name in subfolders]]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises from six unrelated trees
        raise WeightsError(
            f"{path}: {', '.join(subfolders)} must be read, but the local Hugging Face cache does "
            f"not hold it and it cannot be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Download it where there is a network, `hf download "
            f"{path} --local-dir <folder>`, and name that folder; unset HF_HUB_OFFLINE if set"
        ) from error


def read_json(file: Path) -> dict[str, object]:
    """Return a JSON object.

    Raises:
        WeightsError: missing or damaged, naming the file.
    """
    try:
        return read_json_object(file)
    except UnreadableFileError as error:
        raise WeightsError(
            f"{error}; a Diffusers-format folder has it. Download the model again, or point to "
            "another folder"
        ) from error


def transformer_names(
    folder: Path, modules: Sequence[str], *, has_index: bool = True
) -> tuple[str, ...]:
    """Return those of ``modules`` that the index of a pipeline folder has.

    Args:
        has_index: False: the folder needs none, and those that have a configuration are meant.

    Raises:
        WeightsError: no index, or a damaged one.
    """
    if not has_index:
        return tuple(name for name in modules if (folder / name / "config.json").is_file())
    index = read_json(folder / "model_index.json")
    return tuple(name for name in modules if index_entry(folder, index, name)[0])


def index_entry(
    folder: Path, index: Mapping[str, object], name: str
) -> tuple[str, str] | tuple[None, None]:
    """Library and class of a part of a pipeline, as ``index``, its ``model_index.json``, states.

    Raises:
        WeightsError: the entry is anything else than the two, or two nulls.
    """
    entry = index.get(name)
    match entry:
        case None | [None, None]:
            return None, None
        case [str(library), str(class_name)]:
            return library, class_name
    raise WeightsError(
        f"{folder / 'model_index.json'}: {name!a} must be a library and a class, or two nulls, and "
        f"is {entry!a:.80}; download it again"
    )


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """Return the safetensors files of one module, from its index where it is sharded.

    Raises:
        WeightsError: neither a weight file nor an index, or a damaged index.
    """
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return (whole,)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        raise WeightsError(
            f"{whole} is missing, and so is {index.name}: without either there are no weights. "
            "Download the folder again (a .bin file must be converted to safetensors first)"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{index} has no weight_map, so no shard is known; download it again")
    try:
        return tuple(sorted({path_inside(folder, name, index) for name in shards.values()}))
    except (UnreadableFileError, TypeError) as error:
        raise WeightsError(f"{error}; download the folder again") from error


def file_problem(file: Path) -> str | None:
    """Say what is wrong with a safetensors file, from its header and its length alone."""
    if not file.is_file():
        return f"{file} is missing; the folder's index names it. Download it again"
    try:
        read_header(file)
    except UnreadableFileError as error:
        return f"{error}. Download it again"
    return None


def not_trained_from(dtype: str) -> str:
    """Say why weights of ``dtype`` (by safetensors' name) are refused."""
    return (
        f"is stored as {dtype}; only 16 bits and more can be trained from: 8-bit numbers have 2 or "
        "3 bits behind the point, so each weight is off by some percent, and a scale beside them "
        "would be lost. Use the 16-bit or fp32 files that they were made from"
    )


def module_problems(folder: Path, stem: str) -> Iterator[str]:
    """What is missing or damaged in one module's folder."""
    if not folder.is_dir():
        yield f"{folder} is missing; a Diffusers-format folder has it. Download it again"
        return
    if not (folder / "config.json").is_file():
        yield f"{folder / 'config.json'} is missing; it describes how to build the module"
    else:
        try:
            read_config(folder / "config.json")
        except WeightsError as error:
            yield str(error)
    try:
        files = weight_files(folder, stem)
    except WeightsError as error:
        yield str(error)
        return
    damaged = list(filter(None, map(file_problem, files)))
    yield from damaged
    if stem == DIFFUSERS_STEM and not damaged:
        # Encoders may hold whole numbers, and are never trained.
        yield from filter(None, map(_dtype_problem, files))


def _dtype_problem(file: Path) -> str | None:
    tensors = read_header(file).tensors
    narrow = {name: dtype for name, (dtype, *_) in tensors.items() if dtype not in FLOATS}
    if not narrow:
        return None
    name, dtype = next(iter(narrow.items()))
    return f"{file}: {name} (and {len(narrow) - 1} more) {not_trained_from(dtype)}"


def has_weights(folder: Path, stem: str) -> bool:
    """Return whether one module can be read whole now."""
    return not any(module_problems(folder, stem))


def pipeline_problems(
    folder: Path, modules: Sequence[str], *, components: bool, has_index: bool = True
) -> Iterator[str]:
    """What is missing or damaged in a pipeline folder.

    A text encoder may be absent (a data set with stored embeddings needs none), but not broken.

    Args:
        modules: names that its transformers may have (``ModelKind.modules``).
        components: examine VAE and encoders too.
        has_index: see ``transformer_names``.
    """
    index = folder / "model_index.json"
    names: tuple[str, ...] = ()
    if has_index and not index.is_file():
        yield (
            f"{index} is missing, so {folder} is no Diffusers-format pipeline folder. The format "
            "of a model's original code is another one: use its Diffusers-format repository. This "
            "folder can be the weights that a role starts with"
        )
    else:
        try:
            names = transformer_names(folder, modules, has_index=has_index)
        except WeightsError as error:
            yield str(error)
            return
    for name in names or modules[:1]:
        yield from module_problems(folder / name, DIFFUSERS_STEM)
    if components:
        yield from component_problems(folder)


def component_problems(folder: Path) -> Iterator[str]:
    """What is missing or damaged among VAE, encoders, tokenizers and image processor."""
    yield from module_problems(folder / "vae", DIFFUSERS_STEM)
    for encoder in sorted(folder.glob("text_encoder*")):
        yield from text_problems(folder, encoder.name.removeprefix("text_encoder"))
    if (folder / "image_encoder").is_dir():
        yield from image_problems(folder)


def text_problems(folder: Path, suffix: str = "") -> Iterator[str]:
    """What is missing or damaged where a prompt is to be encoded.

    Args:
        suffix: ``"_2"``, ``"_3"`` of a further encoder and its tokenizer.
    """
    yield from module_problems(folder / f"text_encoder{suffix}", TRANSFORMERS_STEM)
    if problem := tokenizer_problem(folder / f"tokenizer{suffix}"):
        yield (
            f"{problem}, and text_encoder{suffix}/ beside it is of no use without. Download it "
            "again"
        )


def tokenizer_problem(folder: Path) -> str | None:
    """Say what a tokenizer's folder lacks."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES) or reads_bytes(folder):
        return None
    return f"{folder} holds none of {', '.join(TOKENIZER_FILES)}"


def reads_bytes(tokenizer: Path) -> bool:
    """Return whether a tokenizer's words are bytes, so that no file lists them."""
    file = tokenizer / "tokenizer_config.json"
    with suppress(WeightsError):  # a damaged file is a problem of the folder
        return file.is_file() and read_json(file).get("tokenizer_class") == "ByT5Tokenizer"
    return False


def image_problems(folder: Path) -> Iterator[str]:
    """What is missing or damaged where an image is to be encoded."""
    yield from module_problems(folder / "image_encoder", TRANSFORMERS_STEM)
    file = image_processor_file(folder)
    if not file.is_file():
        yield f"{file} is missing, and image_encoder/ is of no use without. Download it again"


def image_processor_file(folder: Path) -> Path:
    """Settings of a pipeline's image processor, which some pipelines call a feature extractor."""
    files = [folder / name / "preprocessor_config.json" for name in IMAGE_PROCESSORS]
    return next((file for file in files if file.is_file()), files[0])


def folder_problem(path: str) -> str | None:
    """Why ``path`` is neither a folder here nor a hub id."""
    return None if is_hub_id(path) or Path(path).is_dir() else _no_folder(path)


def _no_folder(path: str) -> str:
    if Path(path).is_file():
        return (
            f"{path} is a file: it may hold weights, but neither how their model is built nor its "
            "VAE and encoders. A role's path is a Diffusers-format folder or hub id of the same "
            "architecture; this can be the weights that the role starts with"
        )
    known = [parent for parent in Path(path).parents if parent.is_dir()]
    nearest = f" (the nearest that exists is {known[0]})" if known and os.path.isabs(path) else ""
    return (
        f"{path} is no folder{nearest} and no hub id; it must be a Diffusers-format folder or a "
        f"hub id, owner/name{folder_hint(path)}"
    )


def folder_hint(path: str) -> str:
    """For a path that reads as a hub id: somebody may have forgotten ``./``."""
    return f"; for a folder write ./{path}" if _HUB_ID.fullmatch(path) else ""
