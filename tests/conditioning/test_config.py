"""The sections' rules, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from distill_conditioning import ConditioningConfig, DataConfig


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match="within 0 and 1"):
        ConditioningConfig(dropout=dropout)


def test_verification_has_two_depths():
    with pytest.raises(ValueError, match="verify"):
        DataConfig(path="/data", verify="none")  # type: ignore[arg-type]


def test_a_path_is_not_blank():
    with pytest.raises(ValueError, match="must name a folder"):
        DataConfig(path=" ")


def test_a_data_set_is_checked_without_torch(tmp_path, make_folder):
    folder = make_folder(tmp_path, 4)
    code = (
        "import sys, distill_conditioning.config; from distill_conditioning import dataset_info; "
        f"assert dataset_info({str(folder)!r}).samples == 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
