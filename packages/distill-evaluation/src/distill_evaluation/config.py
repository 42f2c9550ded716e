"""Configuration of the `report` callback. Imports no torch."""

from attrs import field, frozen
from attrs.validators import ge, min_len
from distill_protocols.sampler import SamplerSpec


@frozen(kw_only=True)
class ReportEntry:
    """One row of the report.

    Attributes:
        role: whose weights sample.
        sampler: how; left out, the method's own spec for its student.
        ema: the role's averaged weights instead of the live ones.
        sheet: show it in the contact sheet and the MP4.
    """

    role: str
    sampler: SamplerSpec | None = None
    ema: bool = False
    sheet: bool = True


@frozen(kw_only=True)
class ReportConfig:
    """What is measured at the end of a run.

    Attributes:
        judge: folder of the judge (judge.json, judge.safetensors, reference.safetensors).
        prompts: text file, one prompt a line; each must name one class of every attribute.
        clips_per_prompt: clips sampled of each prompt, by every entry from the same noise. The
            Frechet distance falls with their number: compare equal ones only.
        sheet_prompts: prompts shown in the contact sheet and the MP4.
        entries: name -> what to sample; the order is that of the table.
        seed: of the initial noise, apart from the run's own generators.
        fps: of the MP4.
    """

    judge: str = field(metadata={"path": ()})
    prompts: str = field(metadata={"path": ()})
    clips_per_prompt: int = field(default=6, validator=ge(2))
    sheet_prompts: tuple[str, ...] = field(validator=min_len(1))
    entries: dict[str, ReportEntry] = field(validator=min_len(1))
    seed: int = 1234
    fps: int = field(default=6, validator=ge(1))
