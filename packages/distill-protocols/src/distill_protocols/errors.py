"""The errors of the framework, one tree.

::

    DistillError
    ├── ConfigError            the run file is wrong; carries every problem of the file
    ├── ContractError          two parts do not fit together (programmer or plugin author)
    │   ├── RoleError          a role is missing, or trainable where it must be frozen
    │   ├── CapabilityError    the adapter cannot do what the method asks for
    │   └── PluginError        no plugin of that name, or one that does not load
    ├── WeightsError           a weight file, key or shape is missing, unknown or damaged
    ├── DataError              a data set is missing, damaged or of another shape than the model
    │   └── ConditioningError  no negative condition, or one of another prompt or encoder
    ├── CheckpointError        nothing whole to resume from, or a save that failed
    ├── RankError              processes of one run that do not act as one: lost, late, different
    ├── OutputError            the output folder cannot be used
    ├── StorageError           a file could not be written or read while a run was under way
    └── NonFiniteLossError     a loss became inf or nan; carries iteration, terms and batch ids

Every message holds four things: the value that was found, the rule that it breaks, the reason
for the rule, and the way out.

``StopRequested`` (``distill_protocols.stop``) stands outside: a run that was asked to stop has not
failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class DistillError(Exception):
    """Base of every error that this framework raises on purpose."""


class ConfigError(DistillError):
    """The run file is wrong. ``problems`` holds one line per problem, in the order of the file."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ContractError(DistillError):
    """Two parts do not fit together."""


class RoleError(ContractError):
    """A role is missing, or is trainable (or frozen) where it must not be."""


class CapabilityError(ContractError):
    """The adapter lacks a capability that the method needs, or this machine one that a role asks
    for."""


class PluginError(ContractError):
    """No plugin has that name, or the one that has it cannot be loaded."""


class WeightsError(DistillError):
    """A weight file, a key or a shape is missing, unexpected or damaged."""


class DataError(DistillError):
    """A data set is missing, damaged, or does not fit the model."""


class ConditioningError(DataError):
    """A condition that the run needs is absent or belongs to another prompt or encoder."""


class CheckpointError(DistillError):
    """A checkpoint could not be written, or none that is whole could be read."""


class RankError(DistillError):
    """A process of the run died, does not answer, or is not where the others are."""


class OutputError(DistillError):
    """The output folder is not writable or already holds another run."""


class StorageError(DistillError):
    """A file could not be written or read while a run was under way: a full disk, a folder that
    is gone. Its ``__cause__`` is the OSError."""


class NonFiniteLossError(DistillError):
    """A loss is inf or nan.

    Attributes:
        iteration: the 1-based iteration in which it happened.
        losses: every loss term of that step, as Python floats.
        batch_ids: the ids of the samples in the offending batch.
    """

    def __init__(
        self, iteration: int, losses: Mapping[str, float], batch_ids: Sequence[str]
    ) -> None:
        self.iteration = iteration
        self.losses = dict(losses)
        self.batch_ids = tuple(batch_ids)
        terms = ", ".join(f"{name}={value:g}" for name, value in self.losses.items())
        ids = ", ".join(self.batch_ids) or "(the method names no ids)"
        super().__init__(
            f"iteration {iteration}: the loss is not finite ({terms}); batch: {ids}. Every loss "
            "must be finite, because one nan step spoils all weights that it reaches. Look at "
            "these samples first; then lower the learning rate, or raise the precision of the "
            "role."
        )
