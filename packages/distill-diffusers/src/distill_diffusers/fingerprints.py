"""What computes latents and conditions, as named entries read off a pipeline folder. No torch here.

Only what computes counts: weights by type, shape and content, whatever their names and files, and
of configurations and tokenizers what changes an output. So the same encoder is the same after it
was saved again. ``FamilyPlugin.fingerprint`` states what the entries are for.

Weights of up to 64 MB a component are read whole. Of larger ones each tensor over 64 kB gives eight
samples of 4 kB, spread from its first to its last byte: a few thousand reads for the 28 GB of two
text encoders. A training, a merge, a cast or another model changes every tensor, and is seen; a
change that is confined to bytes between the samples, such as a few rows of an embedding table, is
not.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distill_protocols import WHOLE_ENCODER, WeightsError
from distill_runtime import UnreadableFileError, open_file, read_header, read_json_object

from distill_diffusers.folders import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    has_weights,
    image_processor_file,
    locate,
    reads_bytes,
    weight_files,
)

_WHOLE_BYTES = 1 << 26
"""Weights of a component that are read whole."""
_WHOLE_TENSOR = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 8, 1 << 12

_NOT_COMPUTED = frozenset(
    {
        "architectures", "dtype", "is_decoder", "is_encoder_decoder", "name_or_path",
        "output_attentions", "output_hidden_states", "return_dict", "tie_word_embeddings",
        "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys of config.json that no output of an encoder depends on, or that the weights say too."""
_STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
"""Keys of a VAE's config.json that latents are normalised by."""
_SPECIAL_TOKENS = (
    "bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token",
)  # fmt: skip
_TOKENIZER_SETTINGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "padding_side",
    "truncation_side",
)  # fmt: skip
_SLOW_TOKENIZERS = ("spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""What a tokenizer is made from where there is no tokenizer.json."""


def text_settings(length: int, precision: str) -> dict[str, object]:
    """Name what the embeddings of a pipeline's one encoder depend on beside its files.

    Args:
        length: tokens that prompts are padded and cut to.
        precision: of the encoder's weights.
    """
    return {"text_encoder.length": length, "text_encoder.precision": precision}


def latent_fingerprint(source: str) -> dict[str, str]:
    """Name the VAE of a folder or hub id: ``vae.weights``, ``vae.statistics``, ``vae.config.*``.

    Empty where it is not (whole) on this machine.
    """
    folder = locate(source)
    if folder is None:
        return {}
    vae = folder / "vae"
    entries = _module_entries(vae, DIFFUSERS_STEM, "vae")
    if entries:
        entries["vae.statistics"] = _hash_json(latent_statistics(vae))
    for key in _STATISTICS:
        entries.pop(f"vae.config.{key}", None)
    return entries


def condition_fingerprint(
    source: str, parts: Sequence[tuple[str, str]], settings: Mapping[str, object]
) -> dict[str, str]:
    """Name text encoders and tokenizers of a folder or hub id.

    Empty unless all of them are whole on this machine: half of what computes an embedding states
    nothing about it.

    Args:
        parts: folders of each encoder and its tokenizer.
        settings: what else an embedding depends on, by entry.
    """
    folder = locate(source)
    if folder is None or not parts:
        return {}
    entries = {name: str(value) for name, value in settings.items()}
    for encoder, tokenizer in parts:
        weights = _module_entries(folder / encoder, TRANSFORMERS_STEM, encoder)
        tokens = _tokenizer_entries(folder / tokenizer, tokenizer)
        if not weights or not tokens:
            return {}
        entries |= weights | tokens
    return entries | {WHOLE_ENCODER: _hash_whole_encoder(folder, parts, settings)}


def module_fingerprint(source: str, name: str) -> dict[str, str]:
    """Name a module of diffusers in the folder ``name`` of a folder or hub id; empty where it is
    not whole on this machine."""
    folder = locate(source)
    return {} if folder is None else _module_entries(folder / name, DIFFUSERS_STEM, name)


def image_fingerprint(source: str) -> dict[str, str]:
    """Name the encoder of first frames and its processor; empty where there is none."""
    folder = locate(source)
    if folder is None:
        return {}
    entries = _module_entries(folder / "image_encoder", TRANSFORMERS_STEM, "image_encoder")
    try:
        settings = read_json_object(image_processor_file(folder))
    except UnreadableFileError:
        return {}
    return entries and entries | _setting_entries(settings, "image_processor")


def text_encoder_folders(source: str) -> list[tuple[str, str]]:
    """List the folders of text encoders and their tokenizers; none where nothing is here."""
    folder = locate(source)
    names = [] if folder is None else sorted(p.name for p in folder.glob("text_encoder*"))
    return [(name, f"tokenizer{name.removeprefix('text_encoder')}") for name in names]


def latent_statistics(vae: Path) -> dict[str, object]:
    """Read what latents are normalised by, from the VAE's config or its buffers, as they are.

    Raises:
        WeightsError, UnreadableFileError: files are missing or damaged.
    """
    config = read_json_object(vae / "config.json")
    found = {key: config[key] for key in _STATISTICS if config.get(key) is not None}
    for file in weight_files(vae, DIFFUSERS_STEM):
        found |= dict(_read_buffers(file, ("latents_mean", "latents_std")))
    return found


# -- components -----------------------------------------------------------------------------------


def _module_entries(folder: Path, stem: str, name: str) -> dict[str, str]:
    """Return entries of a module's weights and configuration; none where it is not whole."""
    if not has_weights(folder, stem):
        return {}
    try:
        config = read_json_object(folder / "config.json")
        weights = hash_weights(weight_files(folder, stem))
    except (UnreadableFileError, WeightsError, OSError):
        return {}  # a problem of the folder, which is reported as that
    return {f"{name}.weights": weights, **_setting_entries(config, f"{name}.config")}


def _setting_entries(config: Mapping[str, Any], prefix: str) -> dict[str, str]:
    return {
        f"{prefix}.{key}": _short_json(value)
        for key, value in sorted(config.items())
        if value is not None and not key.startswith("_") and key not in _NOT_COMPUTED
    }


def _tokenizer_entries(folder: Path, name: str) -> dict[str, str]:
    try:
        entries = _vocabulary_entries(folder, name)
        files = ("tokenizer_config.json", "special_tokens_map.json")
        settings: dict[str, Any] = {}
        for file in reversed(files):
            if (folder / file).is_file():
                settings |= read_json_object(folder / file)
    except (UnreadableFileError, OSError, TypeError, ValueError, AttributeError):
        return {}
    for key in _SPECIAL_TOKENS:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None:
            entries[f"{name}.{key}"] = str(text)
    chosen = {key: settings[key] for key in _TOKENIZER_SETTINGS if key in settings}
    return entries and entries | _setting_entries(chosen, name)


def _vocabulary_entries(folder: Path, name: str) -> dict[str, str]:
    """Return what makes tokens of text. Padding, cutting and decoding are left out: calls decide
    the former, and nothing is decoded."""
    if (folder / "tokenizer.json").is_file():
        value: dict[str, Any] = read_json_object(folder / "tokenizer.json")
        model = dict(value.get("model") or {})
        # Older files join the two halves of a merge by a blank.
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.pop("merges", None) or ()]
        entries = {f"{name}.vocabulary": _hash_json([model.pop("vocab", None), merges])}
        entries |= _setting_entries(model, f"{name}.model")
        for part in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor"):
            entries[f"{name}.{part}"] = _hash_json(value.get(part))
        return entries
    files = [folder / file for file in _SLOW_TOKENIZERS if (folder / file).is_file()]
    if not files:
        return {f"{name}.vocabulary": "bytes"} if reads_bytes(folder) else {}
    digest = _new_hash()
    for file in files:
        digest.update(file.read_bytes())
    return {f"{name}.vocabulary": digest.hexdigest()}


# -- hashes ---------------------------------------------------------------------------------------


def hash_weights(files: Iterable[Path]) -> str:
    """Hash the tensors in ``files`` by type, shape and content; see the module for how much.

    Neither names nor the division into files count, and equal tensors count once: tied tables are
    stored once or twice.

    Raises:
        UnreadableFileError: a file is no whole safetensors file.
    """
    headers = {file: read_header(file) for file in files}
    size = sum(file.stat().st_size for file in headers)
    hashes: set[str] = set()
    for file, header in headers.items():
        length = max((end for *_, end in header.tensors.values()), default=0)
        first = file.stat().st_size - length
        with open_file(file) as stream:
            for dtype, shape, begin, end in header.tensors.values():
                digest = _new_hash()
                digest.update(f"{dtype} {list(shape)}".encode())
                for part in _parts(first + begin, first + end, whole=size <= _WHOLE_BYTES):
                    digest.update(_read(stream, part))
                hashes.add(digest.hexdigest())
    digest = _new_hash()
    for one in sorted(hashes):
        digest.update(one.encode())
    return digest.hexdigest()


def _parts(begin: int, end: int, *, whole: bool) -> Iterator[range]:
    """Yield the bytes of one tensor that are read."""
    size = end - begin
    if whole or size <= _WHOLE_TENSOR:
        yield range(begin, end)
        return
    for index in range(_SAMPLES):
        start = begin + (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)
        yield range(start, start + _SAMPLE_BYTES)


def _read(stream: BinaryIO, part: range) -> bytes:
    stream.seek(part.start)
    return stream.read(len(part))


def _read_buffers(file: Path, names: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    header = read_header(file)
    ends = [end for *_, end in header.tensors.values()]
    first = file.stat().st_size - max(ends, default=0)
    for name in names:
        dtype, _, begin, end = header.tensors.get(name, ("", (), 0, 0))
        if dtype in _DECODERS:
            with open_file(file) as stream:
                yield name, _DECODERS[dtype](_read(stream, range(first + begin, first + end)))


def _floats(code: str) -> Callable[[bytes], list[float]]:
    return lambda content: [float(value) for (value,) in struct.iter_unpack(f"<{code}", content)]


def _bfloat16(content: bytes) -> list[float]:
    # A bfloat16 is the upper half of a float32.
    halves = [content[i : i + 2] for i in range(0, len(content), 2)]
    return _floats("f")(b"".join(b"\0\0" + half for half in halves))


_DECODERS: Mapping[str, Callable[[bytes], list[float]]] = {
    "F64": _floats("d"),
    "F32": _floats("f"),
    "F16": _floats("e"),
    "BF16": _bfloat16,
}


def _hash_json(value: Any) -> str:
    digest = _new_hash()
    digest.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"))
    return digest.hexdigest()


def _short_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 80 else _hash_json(value)


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _hash_whole_encoder(
    folder: Path, parts: Sequence[tuple[str, str]], settings: Mapping[str, object]
) -> str:
    """Compute the one hash that earlier releases recorded, of all files and settings."""
    digest = _new_hash()
    digest.update(repr(tuple(settings.values())).encode())
    for encoder, tokenizer in parts:
        files = [
            folder / encoder / "config.json",
            *weight_files(folder / encoder, TRANSFORMERS_STEM),
            *sorted(path for path in (folder / tokenizer).iterdir() if path.is_file()),
        ]
        for file in files:
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(_hash_file(file))
    return digest.hexdigest()


def _hash_file(file: Path) -> bytes:
    """Hash a file up to 64 MiB whole; of a larger one its size and 64 pieces of 64 kB."""
    digest = _new_hash()
    size, pieces, length = file.stat().st_size, 64, 1 << 16
    digest.update(size.to_bytes(8, "little"))
    with open_file(file) as stream:
        if size <= _WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(pieces):
                start = (size - length) * index // (pieces - 1)
                digest.update(_read(stream, range(start, start + length)))
    return digest.digest()
