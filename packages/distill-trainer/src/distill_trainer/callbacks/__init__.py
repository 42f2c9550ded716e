"""Callbacks, one a file. Their config classes are in ``distill_trainer.plugins``, without torch."""
