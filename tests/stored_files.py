"""Samples of other codes for tests, in the layouts that their sources state."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet

LATENT = (8, 3, 4, 4)
WIDTH = 64


def columns(name: str, value: np.ndarray, dtype: str) -> dict[str, object]:
    if dtype == "bfloat16":
        content = (value.astype("<f4").view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        content = value.astype(dtype).tobytes()
    return {
        f"{name}_bytes": content, f"{name}_shape": list(value.shape), f"{name}_dtype": dtype,
    }  # fmt: skip


def row(number: int, *, dtype: str = "float32", text: int = 5, **latent) -> dict[str, object]:
    values = np.arange(np.prod(LATENT), dtype=np.float32).reshape(LATENT) / 128 + number
    embedding = np.full((text, WIDTH), number + 0.5, np.float32)
    return {
        "id": f"clip{number}", "caption": f"caption {number}", "file_name": "a.mp4",
        "media_type": "video", "width": 32, "num_frames": 9,
        **columns("vae_latent", values, dtype), **columns("text_embedding", embedding, dtype),
        **latent,
    }  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=2, compression="zstd")


def write_lmdb(folder: Path, prompts: list[str], latents: np.ndarray) -> None:
    """Write latents [N, S, T, C, H, W] as CausVid's and Self-Forcing's scripts do."""
    with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as put:
        for number, (prompt, value) in enumerate(zip(prompts, latents, strict=True)):
            put.put(f"prompts_{number}_data".encode(), prompt.encode())
            put.put(f"latents_{number}_data".encode(), value.astype(np.float16).tobytes())
        put.put(b"latents_shape", " ".join(map(str, latents.shape)).encode())
        put.put(b"prompts_shape", str(len(prompts)).encode())
