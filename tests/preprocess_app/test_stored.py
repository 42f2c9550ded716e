"""FastVideo's parquet files, in the layout of docs and source of its release 0.2.0."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distill_conditioning import DataConfig, LatentDataset, dataset_info
from distill_media import CaptionsConfig, MediaError, SourceConfig, StoredReader, read_items
from distill_preprocess.cli import main
from distill_protocols import DataError
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from preprocess_requests import write_request
from stored_files import LATENT, WIDTH, columns, row, write_parquet


def read_all(folder: Path):
    reader = StoredReader()
    items = read_items([SourceConfig(latents=str(folder))], CaptionsConfig())
    return [(item, reader.read(item)) for item in items]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_the_dtype_column_is_honoured(tmp_path, dtype):
    write_parquet(
        tmp_path / "worker_0/data_chunk_0.parquet", [row(n, dtype=dtype) for n in range(3)]
    )
    found = read_all(tmp_path)
    assert [item.id for item, _ in found] == [
        f"worker_0/data_chunk_0.parquet/clip{n}" for n in range(3)
    ]
    for number, (item, sample) in enumerate(found):
        assert item.captions == (f"caption {number}",)
        assert sample.latents.shape == LATENT
        assert sample.latents[0, 0, 0, 0] == number
        assert sample.latents[-1, -1, -1, -1] == pytest.approx(number + 383 / 128, abs=0.04)
        assert (sample.conditions["text_embedding"] == number + 0.5).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vae_latent_dtype": "object"}, "'object', and none of float16"),
        ({"vae_latent_shape": [4, 3, 4]}, "must be 4 sizes"),
        ({"vae_latent_shape": [4, 3, 4, -4]}, "must be 4 sizes"),
        ({"vae_latent_bytes": b"short"}, "has 5 bytes"),
        ({"vae_latent_shape": []}, "it holds no vae_latent"),
    ],
    ids=["dtype", "axes", "negative", "bytes", "none"],
)
def test_rows_that_are_wrong_are_named(tmp_path, change, reason):
    write_parquet(tmp_path / "a.parquet", [row(0, **change)])
    with pytest.raises(MediaError, match=reason):
        read_all(tmp_path)


def test_files_that_are_wrong_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no \.parquet file"):
        read_all(tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"id": "a", "caption": "x"}])
    with pytest.raises(DataError, match=r"lacks the column\(s\) text_embedding_bytes"):
        read_all(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is no parquet file"):
        read_all(tmp_path)


def test_they_become_a_data_set_and_what_does_not_fit_is_named(tmp_path, capsys):
    wrong = columns("vae_latent", np.zeros((8, 2, 4, 4), np.float32), "float32")
    infinite = columns("vae_latent", np.full(LATENT, np.inf, np.float32), "float32")
    rows = [row(0), row(1, **wrong), row(2, text=9), row(3, **infinite), row(4, dtype="float16")]
    write_parquet(tmp_path / "parquet/data_chunk_0.parquet", rows)
    file = write_request(tmp_path, sources=[{"latents": "./parquet"}])
    assert main(["--config", str(file), "--dry-run"]) == EXIT_OK
    assert "as they are stored" in capsys.readouterr().out
    assert main(["--config", str(file)]) == EXIT_OK
    assert dataset_info(tmp_path / "data").problems == ()
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"))
    assert [dataset.id(n)[-5:] for n in range(len(dataset))] == ["clip0", "clip4"]
    batch = dataset.read(torch.arange(2))
    assert batch.latents[1, 0, 0, 0, 0] == 4
    text = batch.cond.tensors["text"]
    assert text.shape == (2, 8, WIDTH)
    assert (text[1, :5] == 4.5).all()
    assert (text[:, 5:] == 0).all()
    lines = [json.loads(line) for line in (tmp_path / "data/report.jsonl").read_text().splitlines()]
    skipped = {line["id"][-5:]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped.keys() == {"clip1", "clip2", "clip3"}
    assert "and the models take [8, 3, 4, 4]" in skipped["clip1"]
    assert "its text embedding is [9, 64]" in skipped["clip2"]
    assert "not finite" in skipped["clip3"]


def test_latents_stand_alone(tmp_path, capsys):
    write_parquet(tmp_path / "parquet/a.parquet", [row(0)])
    (tmp_path / "clips").mkdir()
    sources = [{"latents": "./parquet"}, {"folder": "./clips"}]
    assert main(["--config", str(write_request(tmp_path, sources=sources))]) == EXIT_USAGE
    assert "latents stand beside others" in capsys.readouterr().err
    file = write_request(tmp_path, sources=[{"latents": "./parquet"}], first_frames=True)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file)]) == EXIT_USAGE
    assert "no frames in files of latents" in capsys.readouterr().err
