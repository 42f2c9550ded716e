"""What the suite of model families needs to know about one family, and the models it loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from attrs import Factory, define, field, frozen
from distill_protocols import (
    Capabilities,
    CausalRollout,
    Chunk,
    Condition,
    DistillAdapter,
    FamilyPlugin,
    GivenFrames,
    ImageConditioning,
    ModelBundle,
    RoleHandle,
    RoleSpec,
    RowGenerators,
    WeightSource,
)
from distill_protocols.plugins import EMPTY
from torch import Tensor, nn

from distill_conformance.failures import NotApplicable, applies_if, require_close

ROWS = 2
"""Rows of a batch in most checks."""


@frozen(eq=False)
class LoadedModels:
    """The roles of a case and the adapter that calls them."""

    bundle: ModelBundle
    adapter: DistillAdapter


def _student_and_teacher(case: AdapterCase) -> tuple[RoleSpec, ...]:
    return (
        RoleSpec(name="student", path=case.source, trainable=True),
        RoleSpec(name="teacher", path=case.source, trainable=False),
    )


@define(eq=False, kw_only=True, slots=False)
class AdapterCase:
    """One configuration of a family to hold against the contract.

    The models are loaded once a case, so a fixture that returns one is best of scope ``module``.

    Attributes:
        plugin: the family.
        config: its ``pipeline_config``.
        source: folder of a tiny pipeline, whose models take milliseconds a call.
        roles: what is loaded; left out, a trainable ``student`` and a frozen ``teacher``, both
            of ``source``.
        prompts: two that the text encoder encodes differently.
        negative_prompt: another one.
        linear_guidance: whether guidance is ``u + w (c - u)``. False for a family that combines
            the two predictions otherwise; w = 1 and w = 0 must mean the same there.
        unread_parameters: ends of the names of trained parameters that a call never reads.
        pixel_shape: (F, H_px, W_px) of a clip; left out, that of a decoded one.
        perturbation: of noise that is added to all trained weights after loading. A tiny model
            that is fresh from its constructor often ends in zeros, and every check would hold.
        rtol, atol: how far two calculations of the same value may differ.
    """

    plugin: FamilyPlugin[Any]
    config: Any
    source: str = field(converter=str)
    roles: Sequence[RoleSpec] = Factory(_student_and_teacher, takes_self=True)
    prompts: tuple[str, str] = ("a dog runs left", "two birds")
    negative_prompt: str = "blurry"
    linear_guidance: bool = True
    unread_parameters: Sequence[str] = ()
    pixel_shape: tuple[int, int, int] | None = None
    perturbation: float = 0.02
    rtol: float = 1e-4
    atol: float = 1e-5
    _conditions: dict[tuple[int, bool], Condition] = field(factory=dict, init=False)

    # -- models ---------------------------------------------------------------------------------

    @cached_property
    def loaded(self) -> LoadedModels:
        """The roles of the case with perturbed weights, loaded at first use."""
        return self.load(self.roles)

    def load(
        self,
        roles: Sequence[RoleSpec],
        *,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        perturb: bool = True,
    ) -> LoadedModels:
        """Load ``roles``; the perturbation is a function of the place of a parameter alone.

        Args:
            weights: by role and module, instead of those of the role's path; those roles are
                not perturbed.
        """
        bundle = self.plugin.load(roles, self.config, device=torch.device("cpu"), weights=weights)
        if perturb:
            for name, role in bundle.roles.items():
                if name not in weights:
                    self._perturb(role)
        adapter = self.plugin.adapter(bundle, self.config, source=self.components)
        return LoadedModels(bundle, adapter)

    def _perturb(self, role: RoleHandle) -> None:
        with torch.no_grad():
            for key in role.modules:
                for i, parameter in enumerate(role.trained_parameters(key).values()):
                    noise = normal(*parameter.shape, seed=i).to(parameter)
                    parameter.add_(noise, alpha=self.perturbation)

    @property
    def components(self) -> str:
        """Where VAE and encoders come from."""
        return self.plugin.components(self.config) or self.source

    @property
    def adapter(self) -> DistillAdapter:
        """The adapter of ``loaded``."""
        return self.loaded.adapter

    @property
    def bundle(self) -> ModelBundle:
        """The roles of ``loaded``."""
        return self.loaded.bundle

    @property
    def capabilities(self) -> Capabilities:
        """What the plugin states."""
        return self.plugin.capabilities(self.config)

    @property
    def model_roles(self) -> tuple[str, ...]:
        """Names of the roles that are models, not discriminators."""
        return tuple(spec.name for spec in self.roles if spec.heads is None)

    @property
    def causal_roles(self) -> tuple[str, ...]:
        """Names of the causal ones among them."""
        return tuple(n for n in self.model_roles if n in self.capabilities.causal_roles)

    @property
    def trained_role(self) -> RoleSpec:
        """The first role that trains all its weights.

        Raises:
            NotApplicable: the case has none.
        """
        for spec in self.roles:
            if spec.trainable and spec.heads is None and spec.lora is None:
                return spec
        raise NotApplicable("no role of the case trains all its weights")

    def spec(self, role: str) -> RoleSpec:
        """Return the role called ``role``."""
        return next(spec for spec in self.roles if spec.name == role)

    def load_with(
        self,
        role: RoleSpec,
        *,
        weights: Mapping[str, WeightSource] = EMPTY,
        perturb: bool = True,
    ) -> LoadedModels:
        """Load the roles of the case, with ``role`` in the place of the one of its name.

        Args:
            weights: by module of ``role``, instead of those of its path.
        """
        roles = [role if spec.name == role.name else spec for spec in self.roles]
        return self.load(roles, weights={role.name: weights} if weights else EMPTY, perturb=perturb)

    # -- inputs ---------------------------------------------------------------------------------

    def noise(self, rows: int = ROWS, *, seed: int = 0) -> Tensor:
        """Standard normal latents [rows, C, T, H, W]."""
        return normal(rows, *self.adapter.latent_shape, seed=seed)

    def times(self, role: str, rows: int = ROWS) -> tuple[Tensor, ...]:
        """t [rows] with another value in each row: one tensor for each range of an expert."""
        steps = torch.arange(1, rows + 1, dtype=torch.float32) / (rows + 1)
        return tuple(low + (high - low) * steps for low, high in self.ranges(role))

    def ranges(self, role: str) -> tuple[tuple[float, float], ...]:
        """Return ranges of t in which ``role`` does not change its expert."""
        experts = self.adapter.experts
        return ((0.0, 1000.0),) if experts is None else experts.expert_ranges(role)

    def condition(self, rows: int = ROWS, *, image: bool | None = None) -> Condition:
        """Return the case's prompts in turn, with the frames that a role cannot do without.

        Encoded once, as a family may read its encoder anew for each encoding.

        Args:
            image: True or False: with one, or without.
        """
        least = self.least_frames
        if image is None:
            image = bool(least)
        if (rows, image) not in self._conditions:
            prompts = [self.prompts[i % len(self.prompts)] for i in range(rows)]
            cond = self.adapter.encode_condition(prompts)
            if image:
                cond = self.with_pictures(cond, rows)
            self._conditions[rows, image] = cond
        return self._conditions[rows, image]

    @cached_property
    def least_frames(self) -> GivenFrames:
        """The frames that some role cannot do without."""
        models = [spec for spec in self.roles if spec.heads is None]
        least = [self.plugin.frame_conditions(spec, self.config).least for spec in models]
        first = max((one.first for one in least), default=0)
        return GivenFrames(first=first, last=any(one.last for one in least))

    def with_pictures(self, cond: Condition, rows: int = ROWS, *, seed: int = 5) -> Condition:
        """Add a first frame to each row, and a last one where a role cannot do without."""
        first = self.pictures(rows, seed=seed)
        if not self.least_frames.last:
            return self.images.with_image(cond, first)
        return self.images.with_image(cond, first, last=self.pictures(rows, seed=seed + 100))

    @cached_property
    def negative(self) -> Condition:
        """The negative condition, one row; encoded once."""
        return self.adapter.encode_neg_condition(self.negative_prompt)

    def pictures(self, rows: int = ROWS, *, seed: int = 5) -> Tensor:
        """First frames [rows, 3, H_px, W_px] in [0, 1]."""
        _, height, width = self.clip_shape
        return normal(rows, 3, height, width, seed=seed).sigmoid()

    @cached_property
    def clip_shape(self) -> tuple[int, int, int]:
        """(F, H_px, W_px) of a clip of the run."""
        if self.pixel_shape is not None:
            return self.pixel_shape
        applies_if(
            self.capabilities.supports_decode,
            "the size of a clip is not known: set AdapterCase.pixel_shape",
        )
        _, _, frames, height, width = self.adapter.decode(self.noise(1)).shape
        return frames, height, width

    @property
    def images(self) -> ImageConditioning:
        """The contract for pictures.

        Raises:
            NotApplicable: the family reads none.
        """
        images = self.adapter.images
        if images is None:
            raise NotApplicable("the family reads no pictures")
        return images

    @property
    def causal(self) -> CausalRollout:
        """The contract for causal roles.

        Raises:
            NotApplicable: no role is causal.
        """
        causal = self.adapter.causal
        if causal is None or not self.causal_roles:
            raise NotApplicable("no role of the case is causal")
        return causal

    def chunks(self, role: str) -> tuple[Chunk, ...]:
        """How ``role`` divides a clip of the run."""
        frames = self.adapter.latent_shape[1]
        causal = self.adapter.causal
        return (Chunk(0, frames),) if causal is None else causal.chunks(role)

    def need(self, capability: str) -> None:
        """Raise ``NotApplicable`` unless the family states ``capability``."""
        applies_if(
            not self.capabilities.missing([capability]), f"the family does not state {capability}"
        )

    # -- results --------------------------------------------------------------------------------

    def require_close(self, actual: Tensor, expected: Tensor, rule: str) -> None:
        """Require that two calculations agree within the tolerance of the case."""
        require_close(actual, expected, rule, rtol=self.rtol, atol=self.atol)

    @contextlib.contextmanager
    def clean_gradients(self) -> Iterator[None]:
        """Drop all gradients before and after the block."""
        drop_gradients(self.bundle)
        try:
            yield
        finally:
            drop_gradients(self.bundle)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal [*shape], fp32, a function of ``seed``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_generators(rows: Sequence[int] = range(ROWS)) -> RowGenerators:
    """Return generators of the rows with these places, at their start."""
    return RowGenerators.seeded(11, "conformance", rows)


def drop_gradients(bundle: ModelBundle) -> None:
    """Set all gradients of all roles to None."""
    for module in modules_of(bundle).values():
        for parameter in module.parameters():
            parameter.grad = None


def modules_of(bundle: ModelBundle) -> dict[str, nn.Module]:
    """Return every module by ``role.module``."""
    return bundle.by_module("modules")


@contextlib.contextmanager
def counted_calls(role: RoleHandle) -> Iterator[list[tuple[str, bool]]]:
    """Within: (module, whether gradients are recorded) of each call of ``role``'s modules."""
    calls: list[tuple[str, bool]] = []

    def record(key: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls.append((key, torch.is_grad_enabled()))

        return hook

    hooks = [module.register_forward_pre_hook(record(key)) for key, module in role.modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
