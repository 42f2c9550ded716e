"""Metrics of reports: what each measures, by other means, and what a report does with them."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import attrs
import av
import distill_runtime.plugins
import pytest
import torch
from distill_evaluation import ClipJudge, Judge, JudgeConfig, frechet_distance_of_features
from distill_evaluation.chosen import chosen_metrics, metric_problems, metrics_during
from distill_evaluation.config import ReportConfig, ReportEntry
from distill_evaluation.measures import psnr, ssim
from distill_evaluation.report import ReportCallback
from distill_evaluation.shipped_metrics.configs import (
    FeatureNetworkConfig,
    FrechetConfig,
    FvdConfig,
)
from distill_evaluation.shipped_metrics.frechet import load_network
from distill_evaluation.shipped_metrics.frechet_plugin import frechet
from distill_evaluation.shipped_metrics.fvd import fvd
from distill_evaluation.shipped_metrics.i3d import prepare
from distill_evaluation.shipped_metrics.plugins import NoOptions
from distill_evaluation.shipped_metrics.vbench import VbenchConfig, vbench
from distill_protocols import (
    DataError,
    Metric,
    MetricInputs,
    MetricNumber,
    MetricParts,
    MetricPlugin,
    ModelBundle,
    RealClips,
    RoleHandle,
    RowGenerators,
    RunParts,
    RunState,
    Samples,
    WeightsError,
)
from distill_runtime import ALONE
from report_runs import CPU, Adapter, Conditioning, Method
from safetensors.torch import save_file
from torch import Tensor, nn

INPUTS = MetricInputs(prompts=("a fox", "a hare"), clips_per_prompt=3, fps=6)


def random_clips(count: int, frames: int = 4, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, frames, side, side, generator=generator)


def samples_of(clips: Tensor, prompts: tuple[str, ...] = INPUTS.prompts) -> Samples:
    shape = (len(prompts), -1)
    return Samples(
        prompts=prompts, rows=tuple(range(len(prompts))), clips=clips.unflatten(0, shape),
        latents=clips.unflatten(0, shape),
    )  # fmt: skip


def parts_with(clips: Tensor, inputs: MetricInputs = INPUTS) -> MetricParts:
    shape = cast("tuple[int, int, int, int]", tuple(clips.shape[1:]))
    return MetricParts(
        inputs=inputs, clip_shape=shape, device=CPU, real=RealClips(clips=clips, latents=clips)
    )


def measured(metric: Metric, samples: Samples) -> Mapping[str, float]:
    return metric.combine(metric.measure(samples))


# -- a whole report -------------------------------------------------------------------------------


def run_report(folder: Path, **settings: Any) -> tuple[dict[str, Any], RunState, Adapter]:
    """Report two entries of which one is the other's noise halved; return report.json."""

    class Halving(Adapter):
        def sample(self, role: str, spec: Any, noise: Tensor, cond: Any, **options: Any) -> Tensor:
            return super().sample(role, spec, noise, cond, **options) / (
                2 if role == "student" else 1
            )

    roles = {
        name: RoleHandle(name=name, modules={"net": nn.Linear(1, 1)}, trainable=name == "student")
        for name in ("teacher", "student")
    }
    method, adapter = Method(ModelBundle(roles), None), Halving()
    entries = {name: ReportEntry(role=name) for name in ("teacher", "student")}
    config = ReportConfig(entries=entries, clips_per_prompt=2, **settings)
    parts: Any = RunParts(
        method=method, adapter=adapter, conditioning=Conditioning(), exporter=None,
        output_dir=folder,
    )  # fmt: skip
    report = ReportCallback(config, parts)
    adapter.done.clear()
    run = RunState(
        method=method, loader=None, streams=method.streams, output_dir=folder, max_train_steps=1,
        ranks=ALONE,
    )  # type: ignore[arg-type]  # fmt: skip
    if config.every_steps:
        for iteration in (1, 2):
            report.on_step_end(run, cast(Any, attrs.make_class("Step", ["iteration"])(iteration)))
        assert set(run.metrics) == set(metrics_during(config, chosen_metrics(config)))
    report.on_train_end(run)
    return json.loads((folder / "report.json").read_text()), run, adapter


def test_a_report_without_a_judge_takes_any_captions(tmp_path, capsys):
    captions = ("a red fox, running\u202e", "<b>two</b> hares")
    report, _, _ = run_report(tmp_path, sheet_prompts=captions)
    entry = report["entries"][0]
    assert entry["clips"] == 4
    assert list(entry["metrics"]) == [
        "variance", "motion", "flow", "sharpness", "contrast", "saturation", "clipped",
    ]  # fmt: skip
    assert (entry["frechet_distance"], entry["accuracy"], entry["distances"]) == (None, {}, None)
    assert "judge" not in report
    assert "The judge" not in capsys.readouterr().out
    assert report["clips"]["prompts"] == list(captions)
    for name, clips in report["clips"]["entries"].items():
        assert clips == {"folder": f"report/{name}", "files": ["000.mp4", "001.mp4"]}
        for file in clips["files"]:
            with av.open(str(tmp_path / clips["folder"] / file)) as video:
                frames = list(video.decode(video=0))
            assert len(frames) == 9
            assert frames[0].width >= 128


def test_likeness_is_to_the_references_clips_of_the_same_noise(tmp_path, capsys):
    report, run, adapter = run_report(
        tmp_path, sheet_prompts=("a", "b"), reference="teacher", every_steps=1,
        metrics={"likeness": NoOptions()},
    )  # fmt: skip
    teacher, student = report["entries"]
    assert teacher["metrics"] == {}
    noise = RowGenerators.seeded(1234, "report.measure", range(4), CPU).normal(adapter.latent_shape)
    real, half = torch.sigmoid(noise), torch.sigmoid(noise / 2)
    assert student["metrics"]["psnr"] == pytest.approx(float(psnr(half, real).mean()), rel=1e-5)
    assert student["metrics"]["ssim"] == pytest.approx(float(ssim(half, real).mean()), rel=1e-5)
    assert run.metrics["report/student/ssim"] == student["metrics"]["ssim"]
    # A frozen reference is sampled once a run, the student in each measurement; then the sheets.
    assert adapter.done.count("call") == 2 * (1 + 3 + 2)
    assert "-" in capsys.readouterr().out


def test_a_judges_greyness_is_said_wherever_it_was_asked(tmp_path, capsys):
    judge = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "judge"
    prompts = ("the digit two moving up", "the digit six moving left")
    report, _, _ = run_report(tmp_path, sheet_prompts=prompts, judge=str(judge))
    assert report["judge"] == {"grey": True, "attributes": ["digit", "direction"]}
    assert "averages colours away" in capsys.readouterr().out
    run_report(tmp_path, sheet_prompts=prompts, judge=str(judge), metrics={"motion": NoOptions()})
    assert "averages colours away" not in capsys.readouterr().out


def test_a_judge_may_see_colours(tmp_path):
    torch.manual_seed(0)
    shape: dict[str, Any] = {"frames": 3, "height": 8, "width": 8, "width_factor": 4, "features": 5}
    clips = random_clips(2, frames=3, side=8)
    grey = clips.mean(1, keepdim=True).expand_as(clips)
    for sees_grey_alone in (True, False):
        config = JudgeConfig(attributes={"digit": ("a", "b")}, grey=sees_grey_alone, **shape)
        Judge(ClipJudge(config).eval()).save(tmp_path)
        judge = Judge.load(tmp_path)
        same = torch.allclose(judge.features(clips), judge.features(grey), atol=1e-5)
        assert same == sees_grey_alone
    settings = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps({**settings, "grey": "no"}))
    with pytest.raises(WeightsError, match="true or false"):
        Judge.load(tmp_path)
    # A folder of before says nothing, and is of a grey judge.
    Judge(ClipJudge(JudgeConfig(attributes={"digit": ("a", "b")}, **shape))).save(tmp_path)
    settings = json.loads((tmp_path / "judge.json").read_text())
    del settings["grey"]
    (tmp_path / "judge.json").write_text(json.dumps(settings))
    assert Judge.load(tmp_path).network.config.grey


def test_a_metric_that_does_not_take_the_clips_fails_at_the_start(tmp_path):
    make_network(tmp_path)
    network = FeatureNetworkConfig(
        function="own_networks:flat", weights=str(tmp_path / "weights.safetensors"),
        reference=str(tmp_path / "reference.safetensors"),
    )  # fmt: skip
    save_file({"features": torch.rand(9, 4)}, tmp_path / "reference.safetensors")
    with pytest.raises(DataError, match=r"metric 'frechet' does not take .* has 4 features a clip"):
        run_report(
            tmp_path,
            sheet_prompts=("a",),
            metrics={"frechet": FrechetConfig(networks={"own": network})},
        )


# -- another's metric -----------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class BrightnessConfig:
    channel: int = 0


class BrightnessPlugin(MetricPlugin[BrightnessConfig]):
    name = "brightness"
    help = "mean of a colour"
    contract = 2
    config_class = BrightnessConfig

    def numbers(self, config: BrightnessConfig, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {"brightness": MetricNumber(help="mean of a colour")}

    def build(self, config: BrightnessConfig, parts: MetricParts) -> Metric:
        class Brightness(Metric):
            def measure(self, samples: Samples) -> dict[str, Tensor]:
                return {"all": samples.clips[:, :, config.channel].mean((1, 2, 3, 4))}

            def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
                return {"brightness": float(rows["all"].mean())}

        return Brightness()


class FlowPlugin(BrightnessPlugin):
    def numbers(self, config: BrightnessConfig, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        return {"flow": MetricNumber(help="one of motion's names")}


brightness, other_flow = BrightnessPlugin(), FlowPlugin()


@pytest.fixture
def offered(monkeypatch):
    """Offer the metrics of this module beside the installed ones."""
    real = distill_runtime.plugins.entry_points
    own = {"brightness": "brightness", "other_flow": "other_flow"}

    def entry_points(*, group: str):
        found = real(group=group)
        if group != "distill.metrics":
            return found
        return (*found, *(EntryPoint(n, f"{__name__}:{v}", group) for n, v in own.items()))

    monkeypatch.setattr(distill_runtime.plugins, "entry_points", entry_points)


def test_a_metric_of_another_package_is_measured_as_ours_are(offered, tmp_path, capsys):
    report, run, _ = run_report(
        tmp_path, sheet_prompts=("a", "b"), every_steps=1,
        metrics={"brightness": BrightnessConfig(channel=2)},
    )  # fmt: skip
    assert report["metrics"] == {"brightness": {"help": "mean of a colour", "better": None}}
    values = [entry["metrics"]["brightness"] for entry in report["entries"]]
    assert values[0] == pytest.approx(0.5, abs=0.02)
    assert run.metrics["report/teacher/brightness"] == values[0]
    assert "brightness" in capsys.readouterr().out


def test_two_metrics_of_one_number_are_a_problem(offered):
    config = ReportConfig(
        sheet_prompts=("a",), entries={"a": ReportEntry(role="student")},
        metrics={"motion": NoOptions(), "other_flow": BrightnessConfig()},
    )  # fmt: skip
    [problem] = metric_problems(config)
    assert problem.path == ("metrics", "other_flow")
    assert "'flow' is also one of motion" in problem.message


# -- networks -------------------------------------------------------------------------------------


def make_network(folder: Path) -> nn.Module:
    """Write a package with a network of clips into ``folder``, and its weights."""
    folder.joinpath("own_networks.py").write_text(
        "from torch import nn\n\n\ndef flat():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten(), nn.Linear(24, 6))"
        "\n\n\ndef other():\n    return 3\n"
    )
    sys.path.insert(0, str(folder))
    network = nn.Sequential(nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten(), nn.Linear(24, 6))
    save_file(network.state_dict(), folder / "weights.safetensors")
    return network


@pytest.fixture(autouse=True)
def forget_own_modules():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in {"own_networks", "vbench"} & (set(sys.modules) - modules):
        del sys.modules[name]


def test_frechet_distances_in_any_network(tmp_path):
    network = make_network(tmp_path)
    config = FrechetConfig(
        networks={
            "own": FeatureNetworkConfig(
                function="own_networks:flat", weights=str(tmp_path / "weights.safetensors"), batch=4
            )
        }
    )
    assert frechet.needs(config) == ("real_latents",)
    assert list(frechet.problems(config, INPUTS)) == []
    real, clips = random_clips(12), random_clips(6, seed=1) ** 2
    metric = frechet.build(config, parts_with(real))
    metric.check(samples_of(clips[:2], ("a",)))
    with torch.no_grad():
        expected = frechet_distance_of_features(network(clips), network(real))
    assert measured(metric, samples_of(clips)) == {"fd_own": pytest.approx(expected, rel=1e-4)}
    assert list(frechet.numbers(config, INPUTS)) == ["fd_own"]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("own_networks:nothing", "cannot be imported"),
        ("own_networks:other", "returns a int"),
        ("nowhere_at_all:flat", "cannot be imported"),
    ],
)
def test_what_is_no_network_is_refused(tmp_path, function, why):
    make_network(tmp_path)
    with pytest.raises(WeightsError, match=why):
        load_network(function, tmp_path / "weights.safetensors")
    save_file({"0.weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="does not hold the weights"):
        load_network("own_networks:flat", tmp_path / "weights.safetensors")


# -- adapters of what is not shipped --------------------------------------------------------------


class I3dSignature(nn.Module):
    """What the published file can be called with; its features are means of eighths."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        return torch.nn.functional.adaptive_avg_pool3d(x, (2, 2, 2)).flatten(1)


def test_fvd_is_the_frechet_distance_of_what_the_program_says(tmp_path):
    file = tmp_path / "i3d.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(I3dSignature()), file)
    real, clips = random_clips(8, frames=10), random_clips(6, frames=10, seed=1) ** 2
    with pytest.raises(WeightsError, match="a TorchScript file is a program"):
        fvd.build(FvdConfig(network=str(file)), parts_with(real))
    trusted = hashlib.sha256(file.read_bytes()).hexdigest()
    metric = fvd.build(FvdConfig(network=str(file), sha256=trusted), parts_with(real))

    def features(of: Tensor) -> Tensor:
        return I3dSignature()(prepare(of), False, False, True)

    expected = frechet_distance_of_features(features(clips), features(real))
    assert measured(metric, samples_of(clips)) == {"fvd": pytest.approx(expected, rel=1e-4)}
    with pytest.raises(ValueError, match="at least 10"):
        metric.check(samples_of(random_clips(2), ("a",)))


def test_clips_for_i3d_cover_its_square_and_keep_their_middle():
    clips = torch.zeros(1, 3, 10, 32, 64)
    clips[..., 16:48] = 1  # the middle half: just the square
    prepared = prepare(clips)
    assert prepared.shape == (1, 3, 10, 224, 224)
    assert float(prepared.mean()) > 0.98
    assert float(prepared.max()) == 1


VBENCH = """
import json
from pathlib import Path


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu" and full_info_dir.endswith("VBench_full_info.json")
        self.results = Path(output_path)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, mode=""):
        assert mode == "custom_input"
        files = sorted(Path(videos_path).iterdir(), reverse=True)[SKIPPED:]
        assert all(file.suffix == ".mp4" for file in files)
        scored = [{"video_path": str(f), "video_results": int(f.stem) / 10} for f in files]
        self.results.mkdir()
        text = json.dumps({d: [0.5, scored] for d in dimension_list})
        (self.results / f"{name}_eval_results.json").write_text(text)
"""


@pytest.mark.parametrize("skipped", [0, 1])
def test_vbench_scores_files_and_each_must_have_a_score(tmp_path, skipped):
    config = VbenchConfig(dimensions=("motion_smoothness", "imaging_quality"))
    [problem] = vbench.problems(config, INPUTS)
    assert "not installed" in problem.message
    with pytest.raises(DataError, match="not installed"):
        vbench.build(config, parts_with(random_clips(2)))
    tmp_path.joinpath("vbench.py").write_text(VBENCH.replace("SKIPPED", str(skipped)))
    sys.path.insert(0, str(tmp_path))
    metric = vbench.build(config, parts_with(random_clips(2)))
    samples = samples_of(random_clips(6))
    if skipped:
        with pytest.raises(DataError, match="scored 5 of 6 clips"):
            metric.measure(samples)
        return
    rows = metric.measure(samples)
    assert rows["vbench_imaging_quality"].tolist() == [
        pytest.approx([0, 0.1, 0.2]), pytest.approx([0.3, 0.4, 0.5]),
    ]  # fmt: skip
    assert metric.combine(rows) == {
        name: pytest.approx(0.25) for name in vbench.numbers(config, INPUTS)
    }


def test_dimensions_that_vbench_cannot_measure_are_refused():
    for wrong in (("color",), (), ("motion_smoothness", "motion_smoothness")):
        with pytest.raises(ValueError, match="must name one or more of"):
            VbenchConfig(dimensions=wrong)
