"""``ToyFamily``: plans, loads and exports toy models without files."""

from __future__ import annotations

import json
import math
from collections.abc import (
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import ClassVar

import torch
from attrs import evolve
from distill_protocols import (
    CONTRACT_VERSION,
    EXIT_EMBEDDING,
    Capabilities,
    ContractError,
    Exporter,
    ExportRecord,
    ExportRequest,
    FamilyPlugin,
    Fingerprint,
    ModelBundle,
    ModulePlan,
    Problem,
    RoleHandle,
    RolePlan,
    RoleSpec,
    TensorInfo,
    TensorPlan,
    TensorWeights,
    WeightsError,
    WeightSource,
    derive_seed,
)
from distill_protocols.plugins import EMPTY
from distill_runtime.safetensors_files import write_safetensors
from torch import nn

from distill_conformance.toy.adapter import ToyAdapter
from distill_conformance.toy.networks import (
    CAPABILITIES,
    CONDITION_FINGERPRINT,
    JOINT,
    LATENT_FINGERPRINT,
    LATENT_SHAPE,
    TEXT_DIM,
    ToyConfig,
    ToyExits,
    ToyHeads,
    ToyNet,
)


class ToyFamily(FamilyPlugin[ToyConfig]):
    """Toy models. The path of a role is any text; its weights are a function of it and the seed."""

    name: ClassVar[str] = "toy"
    help: ClassVar[str] = "networks of a thousand weights, for tests"
    contract: ClassVar[int] = CONTRACT_VERSION
    config_class: ClassVar[type] = ToyConfig

    def capabilities(self, config: ToyConfig) -> Capabilities:
        if config.sound:
            return evolve(CAPABILITIES, **JOINT)
        if not config.causal_roles:
            return CAPABILITIES
        return evolve(
            CAPABILITIES,
            supports_kv_cache=True,
            supports_teacher_forcing=True,
            causal_roles=config.causal_roles,
        )

    def role_options(self, config: ToyConfig) -> tuple[str, ...]:
        return ("heads",)

    def export_formats(self) -> Mapping[str, str]:
        return {"toy": "model.safetensors and sampler.json"}

    def role_problems(self, role: RoleSpec, config: ToyConfig) -> Iterable[Problem]:
        return ()

    def latent_shape(self, config: ToyConfig, *, source: str) -> tuple[int, int, int, int]:
        return LATENT_SHAPE

    def latent_tokens(self, config: ToyConfig, *, source: str) -> int:
        return math.prod(LATENT_SHAPE[1:])

    def condition_shapes(self, config: ToyConfig, *, source: str) -> Mapping[str, tuple[int, ...]]:
        return {"text": (TEXT_DIM,)}

    def fingerprint(self, config: ToyConfig, *, source: str) -> Fingerprint:
        return {**LATENT_FINGERPRINT, **CONDITION_FINGERPRINT}

    def plan(self, role: RoleSpec, config: ToyConfig) -> RolePlan:
        plans = [
            ModulePlan(
                name=key,
                architecture=type(module).__name__,
                tensors=tuple(
                    TensorPlan(
                        name=name,
                        shape=tuple(parameter.shape),
                        dtype=parameter.dtype,
                        trained=role.trainable,
                    )
                    for name, parameter in module.named_parameters()
                ),
            )
            for key, module in _build_modules(role).items()
        ]
        return RolePlan(role=role.name, source=role.path, modules=tuple(plans), present=True)

    def load(
        self,
        roles: Sequence[RoleSpec],
        config: ToyConfig,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        handles = {}
        for spec in roles:
            handle = RoleHandle(
                name=spec.name,
                modules=_draw_modules(spec, seed),
                trainable=spec.trainable,
                precision=spec.precision,
                discriminator=spec.heads,
            )
            for key, source in weights.get(spec.name, {}).items():
                _fill_module(handle.modules[key], source)
            shard(handle)
            handles[spec.name] = handle
        return ModelBundle(handles)

    def weights(self, path: str) -> Mapping[str, WeightSource]:
        spec = RoleSpec(name="weights", path=path, trainable=False)
        modules = _draw_modules(spec, seed=0)
        return {key: TensorWeights(path, module.state_dict()) for key, module in modules.items()}

    def adapter(self, bundle: ModelBundle, config: ToyConfig, *, source: str) -> ToyAdapter:
        missing = sorted(config.causal_roles - bundle.roles.keys())
        if missing:
            raise ContractError(f"causal_roles names {missing}, which are no roles of the run")
        return ToyAdapter(bundle, config, self.capabilities(config))

    def exporter(self, config: ToyConfig, *, source: str) -> Exporter:
        return ToyExporter()


def _build_modules(spec: RoleSpec) -> dict[str, nn.Module]:
    """Modules on the meta device, so that their constructors draw from no generator."""
    with torch.device("meta"):
        if spec.heads is not None:
            return {"heads": ToyHeads(len(spec.heads.blocks))}
        exits = {} if spec.exits is None else {EXIT_EMBEDDING: ToyExits(spec.exits.count)}
        return {"transformer": ToyNet(), **exits}


def _draw_modules(spec: RoleSpec, seed: int) -> dict[str, nn.Module]:
    modules = {key: module.to_empty(device="cpu") for key, module in _build_modules(spec).items()}
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy", spec.path))
    with torch.no_grad():
        for key, module in modules.items():
            scale = 0.0 if key == EXIT_EMBEDDING else 0.4  # of exits, nothing is known at first
            for parameter in module.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return modules


def _fill_module(module: nn.Module, source: WeightSource) -> None:
    names = module.state_dict().keys()
    wrong = sorted(names ^ source.describe().keys())
    if wrong:
        raise WeightsError(f"{source.where}: {', '.join(wrong)} are missing or unexpected")
    module.load_state_dict(source.read(names))


class ToyExporter:
    """Writes one safetensors file, and the sampler as JSON."""

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        source = weights["transformer"]
        folder.mkdir(parents=True)
        infos: Mapping[str, TensorInfo] = source.describe()
        write_safetensors(
            folder / "model.safetensors", infos, lambda name: source.read([name])[name]
        )
        sampler = {"steps": request.sampler.steps, "stochastic": request.sampler.stochastic}
        (folder / "sampler.json").write_text(json.dumps(sampler))
        return {"notes": []}

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        source = weights["transformer"]
        expected = source.read(source.describe())
        data = (folder / "model.safetensors").read_bytes()
        missing = [
            name
            for name, tensor in expected.items()
            if tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() not in data
        ]
        if missing:
            raise WeightsError(f"{folder}: {', '.join(missing)} differ from the weights")
        return {"notes": []}
