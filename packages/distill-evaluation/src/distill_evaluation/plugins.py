"""The `report` callback, as the app finds it. Imports no torch."""

from typing import TYPE_CHECKING, ClassVar

from distill_protocols.plugins import CallbackPlugin, RunParts

from distill_evaluation.config import ReportConfig

if TYPE_CHECKING:
    from distill_protocols.callbacks import Callback


class ReportPlugin(CallbackPlugin):
    name: ClassVar[str] = "report"
    help: ClassVar[str] = "at the end: Frechet distance, accuracies, speed, contact sheet, MP4"
    config_class: ClassVar[type] = ReportConfig

    def build(self, config: ReportConfig, parts: RunParts) -> "Callback":
        from distill_evaluation.report import ReportCallback

        return ReportCallback(config, parts)


report = ReportPlugin()
