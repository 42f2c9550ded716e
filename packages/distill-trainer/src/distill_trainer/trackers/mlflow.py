"""Numbers, texts and clips for MLflow (``mlflow-skinny`` or ``mlflow``, an optional extra)."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_media import clips_to_gif
from distill_protocols import ConfigError, RunDescription
from distill_runtime import flatten, to_uint8
from torch import Tensor

_RUN_TAG = "distill.run"
_MOST_AT_ONCE = 100
"""Of params and metrics in one request."""
_MOST_CHARACTERS = 500
_UNFIT = re.compile(r"[^\w\-./ ]")


class MlflowTracker:
    """One MLflow run, found again by the output folder's path.

    It goes where ``MLFLOW_TRACKING_URI`` says, or into ``output_dir/mlruns``; the experiment is
    ``MLFLOW_EXPERIMENT_NAME``, or ``distill``. Settings are params, texts and clips artifacts, the
    final numbers ``final/...``. A resumed run logs iterations that a killed process had logged
    already; MLflow shows both values, which are equal.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, output_dir: str | Path) -> None:
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError as error:
            raise ConfigError(
                [
                    "the tracker 'mlflow' needs the package mlflow, which is not installed; it is "
                    "an optional extra. Install mlflow or mlflow-skinny, or leave the tracker out."
                ]
            ) from error
        self.output_dir = Path(output_dir).resolve()
        self._description = RunDescription(name=self.output_dir.name)
        self._client: Any = None
        self._run_id = ""

    def describe(self, description: RunDescription) -> None:
        """Keep what the run is for the start of the MLflow run, which is at its first number."""
        self._description = description

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        client, now = self._open(), int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(_UNFIT.sub("_", name), value, now, iteration)
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), _MOST_AT_ONCE):
            client.log_batch(self._run_id, metrics=metrics[first : first + _MOST_AT_ONCE])

    def log_summary(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log final numbers, by which MLflow's table compares runs."""
        self.log_scalars(iteration, {f"final/{name}": value for name, value in values.items()})

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._open().log_text(self._run_id, text, f"texts/{_UNFIT.sub('_', name)}.md")

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        folder, _, stem = _UNFIT.sub("_", name).rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{stem}-{iteration:06d}.gif"
            file.write_bytes(clips_to_gif(to_uint8(clips).numpy(), fps))
            self._open().log_artifact(self._run_id, str(file), folder or "clips")

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None

    def _open(self) -> Any:
        if self._client is None:
            uri = os.environ.get("MLFLOW_TRACKING_URI")
            if not uri:
                # MLflow 3 asks for this where numbers go into a folder. Its databases need more
                # packages, and a run has one writer.
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                uri = (self.output_dir / "mlruns").as_uri()
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._run_id = self._find_or_create(self._client)
        return self._client

    def _find_or_create(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "distill"
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        # A hash of the whole path: a resumed run continues its own run, and never one of another
        # folder of the same name.
        key = hashlib.blake2b(str(self.output_dir).encode(), digest_size=8).hexdigest()
        found = client.search_runs([number], f"tags.`{_RUN_TAG}` = '{key}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        tags = {_RUN_TAG: key}
        run_id = client.create_run(number, tags=tags, run_name=self._description.name).info.run_id
        params = [
            self._mlflow.entities.Param(_UNFIT.sub("_", key), str(value)[:_MOST_CHARACTERS])
            for key, value in flatten(self._description.settings).items()
        ]
        for first in range(0, len(params), _MOST_AT_ONCE):
            client.log_batch(run_id, params=params[first : first + _MOST_AT_ONCE])
        if self._description.run_file:
            client.log_text(run_id, self._description.run_file, "run_file.yaml")
        return run_id
