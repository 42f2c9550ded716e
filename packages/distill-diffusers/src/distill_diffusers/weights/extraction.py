"""A low-rank adapter out of a whole fine-tune: the difference to the base, cut off by SVD; and what
is no matrix as the difference itself."""

from __future__ import annotations

import torch
from attrs import field, frozen
from distill_protocols import DTYPES, Precision, WeightSource, derive_seed
from torch import Tensor

from distill_diffusers.weights.derived import round_to

_EXACT = 1024
"""Smaller side of a matrix up to which the SVD is the full one (seconds on a CPU); of a layer of
Wan 14B it would take minutes, and there are 400."""
_OVERSAMPLING, _POWER_ITERATIONS = 16, 6


@frozen(eq=False, kw_only=True)
class Extraction:
    """Low-rank adapters, what goes beside them, and how much of the difference they hold.

    Attributes:
        factors: by layer, A [rank, in] and B [out, rank] with a factor of 1 before ``B A``. A
            layer that did not change has none; where its bias alone did, both are zero, as readers
            take a bias beside them only.
        biases: by layer, the difference of a linear layer's bias.
        differences: by name, that of what else changed and is no linear layer: norms, tables,
            convolutions.
        errors: by layer, ``|D - B A| / |D|`` (Frobenius, D the difference to the base).
        norms: by layer, |D|.
        changes: by layer, |D| as a part of the larger of the two norms (a base may be zero).
        other_changes: the same by name, of ``biases`` and ``differences``.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(factory=dict)
    errors: dict[str, float] = field(factory=dict)
    norms: dict[str, float] = field(factory=dict)
    changes: dict[str, float] = field(factory=dict)
    biases: dict[str, Tensor] = field(factory=dict)
    differences: dict[str, Tensor] = field(factory=dict)
    other_changes: dict[str, float] = field(factory=dict)

    @property
    def relative_error(self) -> float:
        """Over all layers together."""
        lost = sum((self.errors[k] * self.norms[k]) ** 2 for k in self.errors)
        whole = sum(norm**2 for norm in self.norms.values())
        return (lost / whole) ** 0.5 if whole else 0.0

    def summary(self) -> dict[str, object]:
        """For the log and the file beside the weights."""
        error = self.relative_error
        return {
            "layers": len(self.factors),
            "relative_error": error,
            "energy_kept": 1 - error**2,
            "by_layer": {
                layer: {
                    "relative_error": self.errors[layer],
                    "energy_kept": 1 - self.errors[layer] ** 2,
                    "relative_change": self.changes[layer],
                }
                for layer in self.factors
                if layer in self.errors
            },
            "biases": {f"{k}.bias": self.other_changes[f"{k}.bias"] for k in self.biases},
            "differences": {name: self.other_changes[name] for name in self.differences},
        }


def extract(
    whole: WeightSource,
    base: WeightSource,
    rank: int,
    *,
    precision: Precision | None = None,
    seed_name: str = "",
) -> Extraction:
    """Compute the best rank-``rank`` adapter of every linear layer (Eckart & Young 1936).

    Reads both sources tensor by tensor and computes in fp32. Layers whose smaller side is above
    1024 are taken by randomised subspace iteration (Halko et al. 2011, algorithm 5.1) from a
    generator of their own; the reported error is measured, not estimated, and of the factors as
    they are written.

    Args:
        precision: of all that is written; None: fp32.
        seed_name: which module this is, for the generator.
    """
    extraction = Extraction()
    dtype = DTYPES[precision or "fp32"]
    for layer in _linear_layers(base):
        name = f"{layer}.weight"
        delta, norm, change = _difference(whole, base, name)
        if norm == 0:
            continue
        a, b = (
            round_to(factor, dtype, f"the adapter of {layer}")
            for factor in factors(delta, rank, seed=derive_seed(0, "svd", seed_name, layer))
        )
        extraction.factors[layer] = (a, b)
        extraction.errors[layer] = (
            float(torch.linalg.vector_norm(delta - b.float() @ a.float())) / norm
        )
        extraction.norms[layer], extraction.changes[layer] = norm, change
    extract_others(whole, base, extraction, precision=precision)
    for layer in extraction.biases.keys() - extraction.factors.keys():
        rows, columns = base.describe()[f"{layer}.weight"].size
        zeros = (torch.zeros(rank, columns, dtype=dtype), torch.zeros(rows, rank, dtype=dtype))
        extraction.factors[layer] = zeros
    return extraction


def extract_others(
    whole: WeightSource,
    base: WeightSource,
    into: Extraction,
    *,
    precision: Precision | None = None,
) -> None:
    """Add what changed and is no weight of a linear layer."""
    dtype = DTYPES[precision or "fp32"]
    linear = _linear_layers(base)
    for name in sorted(base.describe().keys() - {f"{layer}.weight" for layer in linear}):
        delta, norm, change = _difference(whole, base, name)
        if norm == 0:
            continue
        rounded = round_to(delta, dtype, f"the difference of {name}")
        layer, _, kind = name.rpartition(".")
        if kind == "bias" and layer in linear:
            into.biases[layer] = rounded
        else:
            into.differences[name] = rounded
        into.other_changes[name] = change


def _linear_layers(base: WeightSource) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, info in base.describe().items()
        if name.endswith(".weight") and len(info.size) == 2
    ]


def _difference(whole: WeightSource, base: WeightSource, name: str) -> tuple[Tensor, float, float]:
    """Return D = whole - base, |D|, and |D| as a part of the larger of the two norms."""
    new, old = (source.read([name])[name].float() for source in (whole, base))
    delta = new - old
    norm = float(torch.linalg.vector_norm(delta))
    largest = max(float(torch.linalg.vector_norm(x)) for x in (old, new))
    return delta, norm, norm / largest if norm else 0.0


def factors(delta: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Factorise ``delta`` [out, in] into the nearest (A [rank, in], B [out, rank]).

    Rows and columns beyond its full rank are zero.

    All layers get one rank, because readers infer one scale from it. The singular values are
    shared out by their roots, so that neither factor is small in 16 bits.
    """
    smaller = min(delta.shape)
    if smaller <= _EXACT:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        # svd_lowrank takes no generator: it draws from the global one, which is put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            u, s, v = torch.svd_lowrank(
                delta, q=min(rank + _OVERSAMPLING, smaller), niter=_POWER_ITERATIONS
            )
        vh = v.mT
    kept = min(rank, smaller)
    roots = s[:kept].sqrt()
    a, b = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    a[:kept] = roots[:, None] * vh[:kept]
    b[:, :kept] = u[:, :kept] * roots
    return a, b
