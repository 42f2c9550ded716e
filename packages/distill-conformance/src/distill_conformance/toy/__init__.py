"""A family of tiny models behind the whole contract, for tests of methods.

It needs no files and no model library, and a call takes a fraction of a millisecond. The roles
have any name, and may be causal or discriminators; ``ToyAdapter`` records its calls, so that a
test can ask who was called, at which t, and with gradient or not.

It passes ``AdapterSuite`` itself. ``networks`` are the models, ``adapter`` calls them, ``family``
plans, loads and exports them, and ``roles`` has what a test of a method needs beside them.
"""

from distill_conformance.toy.adapter import ToyAdapter, ToyCall
from distill_conformance.toy.family import ToyExporter, ToyFamily
from distill_conformance.toy.networks import (
    CAPABILITIES,
    CONDITION_FINGERPRINT,
    LATENT_FINGERPRINT,
    LATENT_SHAPE,
    MEAN,
    STD,
    TEXT_DIM,
    WIDTH,
    ToyConfig,
    ToyHeads,
    ToyNet,
)
from distill_conformance.toy.roles import ToyConditioning, add_optimizers, toy_batch, toy_models

__all__ = [
    "CAPABILITIES",
    "CONDITION_FINGERPRINT",
    "LATENT_FINGERPRINT",
    "LATENT_SHAPE",
    "MEAN",
    "STD",
    "TEXT_DIM",
    "WIDTH",
    "ToyAdapter",
    "ToyCall",
    "ToyConditioning",
    "ToyConfig",
    "ToyExporter",
    "ToyFamily",
    "ToyHeads",
    "ToyNet",
    "add_optimizers",
    "toy_batch",
    "toy_models",
]
