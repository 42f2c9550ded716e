"""The judge's folder and its manners."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distill_evaluation import ClipJudge, Judge, JudgeConfig
from distill_protocols import WeightsError


def small_judge() -> Judge:
    torch.manual_seed(0)
    config = JudgeConfig(
        attributes={"digit": ("zero", "one"), "direction": ("left", "right", "up")},
        frames=5,
        height=16,
        width=16,
        width_factor=4,
        features=7,
    )
    return Judge(ClipJudge(config).eval(), batch=2)


def test_saved_and_loaded_judges_agree(tmp_path: Path) -> None:
    judge = small_judge()
    judge.save(tmp_path)
    loaded = Judge.load(tmp_path)
    clips = torch.rand(5, 3, 5, 16, 16)
    assert loaded.network.config == judge.network.config
    torch.testing.assert_close(loaded.features(clips), judge.features(clips), rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]


def test_classifications_have_the_attributes_shape_and_range() -> None:
    judge = small_judge()
    clips = torch.rand(5, 3, 5, 16, 16)
    answers = judge.classify(clips)
    assert judge.features(clips).shape == (5, 7)
    assert {name: tuple(answer.shape) for name, answer in answers.items()} == {
        "digit": (5,),
        "direction": (5,),
    }
    assert int(answers["direction"].max()) < 3
    assert not judge.features(clips).requires_grad


def test_a_clip_is_judged_alone_not_by_its_batch() -> None:
    judge = small_judge()
    clips = torch.rand(5, 3, 5, 16, 16)
    torch.testing.assert_close(
        judge.features(clips)[3:4], judge.features(clips[3:4]), rtol=0, atol=1e-5
    )


def test_prompts_become_expected_answers() -> None:
    expected = small_judge().expected(["one moving up", "zero moving left"])
    assert expected["digit"].tolist() == [1, 0]
    assert expected["direction"].tolist() == [2, 0]


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, 5, 16, 16\]"):
        small_judge().features(torch.rand(1, 3, 5, 16, 18))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    small_judge().save(tmp_path)
    (tmp_path / "judge.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"judge\.safetensors is missing"):
        Judge.load(tmp_path)


def test_settings_that_do_not_fit_the_weights_are_refused(tmp_path: Path) -> None:
    small_judge().save(tmp_path)
    settings = tmp_path / "judge.json"
    settings.write_text(settings.read_text().replace('"features": 7', '"features": 8'))
    with pytest.raises(WeightsError, match="do not describe one judge"):
        Judge.load(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, distill_evaluation; assert 'torch' not in sys.modules; "
        "distill_evaluation.labels_of; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
