"""The rules of a run file, in small passes: each reads a ``Draft`` and yields problems.

A pass is a function from a draft to problems, whose paths begin at the top of the file. It skips
what its draft does not hold: a section that could not be read has problems of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from distill_protocols import Problem

from distill_runfile.checks.callbacks import check_callbacks
from distill_runfile.checks.checkpoints import check_checkpoints
from distill_runfile.checks.conditioning import check_conditioning
from distill_runfile.checks.data import check_data
from distill_runfile.checks.models import check_method, check_models
from distill_runfile.checks.processes import check_processes
from distill_runfile.checks.roles import check_roles
from distill_runfile.checks.sections import check_sections
from distill_runfile.checks.validation import check_sampled, check_validation
from distill_runfile.draft import Draft

Check = Callable[[Draft], Iterable[Problem]]

RUN_CHECKS: tuple[Check, ...] = (
    check_sections, check_processes, check_roles, check_models, check_method, check_data,
    check_conditioning, check_validation, check_checkpoints, check_callbacks,
)  # fmt: skip
"""A run that trains."""

MODELS_CHECKS: tuple[Check, ...] = (check_roles, check_models)
"""The models of a run, for an export."""

COMPONENTS_CHECKS: tuple[Check, ...] = (check_sections, check_roles, check_models)
"""VAE and encoders of a model, to make data with."""

SAMPLED_CHECKS: tuple[Check, ...] = (
    check_sections, check_roles, check_models, check_data, check_sampled,
)  # fmt: skip
"""One frozen role that is sampled on a data set."""
