"""What computed something, as named entries. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

Fingerprint = Mapping[str, str]
"""Dotted names, the component first, to hashes or short texts: ``vae.weights``,
``text_encoder.precision``. Two are compared entry by entry."""

WHOLE_ENCODER = "encoder"
"""An entry that stands for text encoders, tokenizers and settings together: all that data sets of
earlier releases record. It is compared with those alone."""
