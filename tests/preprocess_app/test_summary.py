"""The lines that end a preprocessing."""

from __future__ import annotations

from distill_conditioning import DatasetIndex, ReportLine, Summary
from distill_conditioning.format import SampleShape, ShardEntry
from distill_preprocess.summary import describe_summary

SHAPE = SampleShape(latents=(4, 1, 2, 2), conditions={"text": (2, 3)})
SHARD = ShardEntry(file="a.safetensors", samples=3, bytes=3000, sha256="", shape=SHAPE)
INDEX = DatasetIndex(
    latent_dtype="float16", encoder=None, samples=3, shards=(SHARD,), constants=None
)


def test_what_is_odd_is_counted_with_the_numbers_of_the_first():
    notes = (
        ("#0 cuts to another scene at frame 3", "the caption has 7 tokens"),
        ("#12 cuts to another scene at frame 41",),
        ("the caption has 7 tokens",),
    )
    report = tuple(ReportLine(id=str(n), notes=texts) for n, texts in enumerate(notes))
    summary = Summary(index=INDEX, report=report, same_embedding=())
    lines = describe_summary("mine", summary, ()).splitlines()
    assert lines[1:] == [
        "  2 clips: cuts to another scene at frame 3 (and the like)",
        "  2 clips: the caption has 7 tokens",
    ]
