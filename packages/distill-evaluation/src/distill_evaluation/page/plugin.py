"""The plugin of the ``page`` callback. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from distill_protocols import CallbackPlugin, RunParts

from distill_evaluation.page.config import PageConfig

if TYPE_CHECKING:
    from distill_protocols import Callback


class PagePlugin(CallbackPlugin[PageConfig]):
    name = "page"
    contract = 2
    help = "writes report.html: alarms, clips, curves, quality, time, settings"
    config_class: ClassVar[type] = PageConfig
    on_by_default = True
    shows_results = True

    def build(self, config: PageConfig, parts: RunParts) -> Callback:
        from distill_evaluation.page.callback import PageCallback

        return PageCallback(config)


page = PagePlugin()
