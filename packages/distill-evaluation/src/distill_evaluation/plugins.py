"""The plugin of the `report` callback. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from distill_protocols import CallbackPlugin, DataError, PlannedRun, Problem, RunParts, below
from distill_runtime import UnreadableFileError, read_json_object

from distill_evaluation.config import ReportConfig
from distill_evaluation.labels import (
    Attributes,
    PromptLabelError,
    label_prompts,
    read_prompts,
    read_words,
)

if TYPE_CHECKING:
    from distill_protocols import Callback


FILES = ("judge.json", "judge.safetensors", "reference.safetensors")


class ReportPlugin(CallbackPlugin[ReportConfig]):
    name = "report"
    contract = 2
    help = "at the end or at intervals: Frechet distance, accuracies, speed, contact sheet, MP4"
    config_class: ClassVar[type] = ReportConfig

    def problems(self, config: ReportConfig, run: PlannedRun) -> Iterator[Problem]:
        judge, prompts = Path(config.judge), Path(config.prompts)
        missing = [name for name in FILES if not (judge / name).is_file()]
        if missing:
            yield Problem(
                "judge",
                f"{judge} holds no {', '.join(missing)}; a judge's folder holds all three",
            )
        else:
            try:
                attributes = _attributes(judge)
                label_prompts(config.sheet_prompts, attributes)
            except PromptLabelError as error:
                yield Problem("sheet_prompts", str(error))
            except (UnreadableFileError, AttributeError, KeyError, TypeError, ValueError) as error:
                yield Problem(
                    "judge", f"{judge / 'judge.json'} does not describe a judge ({error})"
                )
            else:
                try:
                    label_prompts(read_prompts(prompts), attributes)
                except DataError as error:
                    yield Problem("prompts", str(error))
        if config.every_steps and not any(entry.during for entry in config.entries.values()):
            yield Problem(
                "every_steps",
                f"{config.every_steps}, but every entry states during: false, so there would be "
                "nothing to measure; leave one of them out, or use every_steps: 0",
            )
        for name, entry in config.entries.items():
            yield from below(run.role_problems(entry.role, ema=entry.ema), "entries", name)
            yield from below(run.sampler_problems(entry.sampler, entry.role), "entries", name)

    def metrics(self, config: ReportConfig) -> Mapping[str, int]:
        try:
            attributes = _attributes(Path(config.judge))
        except (UnreadableFileError, AttributeError, KeyError, TypeError, ValueError):
            return {}  # `problems` reports what is wrong with the judge
        return dict.fromkeys(config.metric_names(attributes), config.every_steps)

    def build(self, config: ReportConfig, parts: RunParts) -> "Callback":
        from distill_evaluation.report import ReportCallback

        return ReportCallback(config, parts)


def _attributes(judge: Path) -> Attributes:
    """Read the judge's attributes and their classes.

    UnreadableFileError or KeyError if its settings cannot be read or are no judge's.
    """
    attributes = cast(Mapping[str, object], read_json_object(judge / "judge.json")["attributes"])
    return {name: read_words(name, classes) for name, classes in attributes.items()}


report = ReportPlugin()
