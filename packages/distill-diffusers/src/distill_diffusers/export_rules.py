"""What of an export request cannot be had. No torch: run files are checked against it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from distill_protocols import ExportRequest, Problem, RoleSpec

from distill_diffusers.folders import DIFFUSERS_STEM, locate, module_problems

FORMATS = {"diffusers": "a pipeline folder", "lora": "low-rank adapters alone"}
"""Those that ``PipelineExporter`` writes of every family."""
PRECISIONS = ("fp32", "bf16", "fp16")


def export_problems(
    role: RoleSpec,
    request: ExportRequest,
    *,
    formats: Collection[str],
    modules: Collection[str],
    others: Collection[str] = (),
    max_rank: Callable[[], int | None],
) -> Iterator[Problem]:
    """Yield what is wrong with ``request`` for ``role``; paths are fields of the request.

    Args:
        formats: that the family writes.
        modules: names of the role's transformers; none where its architecture is not known.
        others: names of its model's transformers that the role does not have: a pipeline folder
            gets those of the role's path.
        max_rank: full rank of the model's largest linear layer; None where it is not known. Called
            only where a request names a rank.
    """
    if role.heads is not None:
        yield Problem(
            "role",
            f"{role.name!r} is a discriminator, and no other tool reads one. Checkpoints hold it: "
            "start another run's from there with init_from",
        )
        return
    if request.format not in formats:
        yield Problem("format", f"{request.format!r} is none of {', '.join(formats)}")
        return
    if request.precision is not None and request.precision not in PRECISIONS:
        yield Problem("precision", f"{request.precision!r} is none of {', '.join(PRECISIONS)}")
    if request.max_shard_bytes < 1:
        yield Problem(
            "max_shard_bytes",
            f"{request.max_shard_bytes} must be at least 1: it is the size of a weight file in "
            "bytes; 5000000000 is customary",
        )
    if request.sampler.guidance_2 is not None and len(modules) == 1 and not others:
        yield Problem(
            "sampler",
            f"guidance_2 {request.sampler.guidance_2:g} is of a second expert, and {role.path} has "
            "one transformer, which would never have it. Leave it out",
        )
    yield from _rank_problems(role, request, max_rank)
    if role.lora is not None and request.format != "lora":
        yield from _base_problems("merged into", role, modules)
    elif role.lora is None and request.format == "lora":
        yield from _base_problems("taken as the difference to", role, modules)
    if request.format == "diffusers" and others:
        yield from _base_problems("completed with", role, others)


def _rank_problems(
    role: RoleSpec, request: ExportRequest, max_rank: Callable[[], int | None]
) -> Iterator[Problem]:
    rank = request.lora_rank
    if rank is None:
        if request.format == "lora" and role.lora is None:
            yield Problem(
                "lora_rank",
                f"missing: role {role.name!r} is no LoRA, so one must be made of its difference to "
                f"{role.path}, and somebody must say how large. 32 to 128 is customary; the error "
                "is reported. Or use format: diffusers",
            )
    elif request.format != "lora":
        yield Problem(
            "lora_rank",
            f"{rank} has no effect on format {request.format!r}, which writes whole weights. Leave "
            "it out, or use format: lora",
        )
    elif role.lora is not None:
        yield Problem(
            "lora_rank",
            f"{rank} has no effect: role {role.name!r} is a LoRA of rank {role.lora.rank} and is "
            "written as it is. Leave it out",
        )
    elif rank < 1:
        yield Problem("lora_rank", f"{rank} must be at least 1: it counts the columns of B")
    else:
        most = max_rank()
        if most is not None and rank > most:
            yield Problem(
                "lora_rank",
                f"{rank} is above {most}, the full rank of the largest layer of {role.path}: the "
                f"LoRA would be larger than the model. Use less than {most}, or format: diffusers",
            )


def _base_problems(use: str, role: RoleSpec, modules: Collection[str]) -> Iterator[Problem]:
    folder = locate(role.path)
    if folder is None:  # Not downloaded yet: no problem of a plan, and loading raises.
        return
    for name in modules:
        for problem in module_problems(folder / name, DIFFUSERS_STEM):
            yield Problem(
                "format", f"role {role.name!r} must be {use} the weights of its path, but {problem}"
            )
