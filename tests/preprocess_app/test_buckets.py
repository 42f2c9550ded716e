"""Clips of several sizes become one data set of several shapes, which a run trains on."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from distill_conditioning import DataConfig, LatentDataset, dataset_info
from distill_preprocess.cli import main
from distill_runfile.cli import EXIT_OK
from distill_train.cli import main as train
from media_files import moving_frames, write_picture, write_video
from preprocess_requests import TINY, write_request

BUCKETS = [
    {"num_frames": 9, "height": 32, "width": 32},
    {"num_frames": 5, "height": 32, "width": 48},
    {"height": 48, "width": 32},
]
SHAPES = {(8, 3, 4, 4), (8, 2, 4, 6), (8, 1, 6, 4)}


def write_media(folder: Path) -> None:
    for number in range(3):
        write_video(folder / f"square-{number}.mp4", moving_frames(12, 40, 40, seed=number))
        write_video(folder / f"wide-{number}.mp4", moving_frames(12, 40, 60, seed=number))
        write_picture(folder / f"tall-{number}.png", moving_frames(1, 60, 40, seed=number)[0])
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text(f"the digit {file.stem[-1]}")


def test_media_of_several_sizes_become_buckets_that_a_run_trains_on(tmp_path):
    threads = torch.get_num_threads()
    pipeline = {"buckets": BUCKETS, "max_sequence_length": 8}
    (tmp_path / "clips").mkdir()
    write_media(tmp_path / "clips")
    request = write_request(tmp_path)
    values = yaml.safe_load(request.read_text()) | {"pipeline_config": pipeline}
    request.write_text(yaml.safe_dump(values))
    assert main(["--config", str(request)]) == EXIT_OK
    info = dataset_info(tmp_path / "data")
    assert {shape.latents for shape in info.shapes} == SHAPES
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"))
    kinds = {
        dataset.id(n).partition("-")[0]: tuple(dataset.read(torch.tensor([n])).latent_shape)
        for n in range(len(dataset))
    }
    assert kinds == {"square": (8, 3, 4, 4), "wide": (8, 2, 4, 6), "tall": (8, 1, 6, 4)}
    run = {
        "recipe": {"family": "wan", "method": "finetune"},
        "models": {"student": {"path": str(TINY / "wan")}},
        "pipeline_config": pipeline,
        "data": {"path": str(tmp_path / "data")},
        "conditioning": {"dropout": 0.1},
        "training": {
            "output_dir": str(tmp_path / "out"), "max_train_steps": 6, "global_batch_size": 2,
            "cpu_threads": 1,
        },
        "validation": {
            "every_steps": 6, "prompts": ["the digit one"],
            "views": {"student": {"role": "student", "sampler": {"steps": 2}}},
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert train(["--config", str(tmp_path / "run.yaml")]) == EXIT_OK
    torch.set_num_threads(threads)
