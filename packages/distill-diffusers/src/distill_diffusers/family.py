"""A model family on diffusers, as an app sees it before torch is imported.

``DiffusersFamily`` is the base class of a family's plugin. It answers everything that a folder, a
module on the meta device and ``ModelKind`` show; a family adds what is true of it alone::

    class LtxFamily(DiffusersFamily[LtxConfig]):
        name = "ltx"
        contract = 2
        help = "LTX-Video, from Diffusers-format folders or hub ids"
        config_class = LtxConfig
        kind = LTX              # a ModelKind
        published = PUBLISHED   # hub id -> PublishedModel

        def latent_info(self, vae): ...           # the latents, from vae/config.json
        def condition_rows(self, transformer, config): ...   # shapes of each condition tensor
        def call_model(self, role, inputs): ...   # one call of the transformer, to plan its memory
        def adapter(self, bundle, config, *, source): ...    # how the models are called
        def exporter(self, config, *, source): ...

and, where they apply, ``unsupported``, ``clip_problems``, ``call_shapes``, ``tokens`` and the hooks
of ``FamilyPlugin`` (capabilities, experts, first frames, names in other codes). Modules that import
torch are imported inside of the methods that need them: a run file without LoRA and discriminators
is checked without torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

from attrs import evolve
from distill_protocols import (
    Capabilities,
    CaptionTokens,
    FamilyPlugin,
    Fingerprint,
    PluginError,
    Problem,
    RoleSpec,
    WeightsError,
    below,
)
from distill_protocols.plugins import EMPTY
from distill_runtime import UnreadableFileError

from distill_diffusers.config import BucketConfig, ClipConfig
from distill_diffusers.descriptions import (
    LatentInfo,
    ModelDescription,
    PublishedModel,
    as_flow_map,
    choose_experts,
    describe_model,
    differing_entries,
    expert_problems,
    statistics_problems,
    unknown_hub_id,
)
from distill_diffusers.export_rules import FORMATS, export_problems
from distill_diffusers.fingerprints import (
    condition_fingerprint,
    latent_fingerprint,
    latent_statistics,
    text_encoder_folders,
)
from distill_diffusers.folders import (
    DIFFUSERS_STEM,
    component_problems,
    folder_problem,
    has_weights,
    is_hub_id,
    locate,
    pipeline_problems,
)
from distill_diffusers.kinds import EXPERTS, ModelKind
from distill_diffusers.model_configs import read_config

if TYPE_CHECKING:
    import torch
    from distill_protocols import (
        CallPlan,
        ExportRequest,
        ForeignNames,
        ModelBundle,
        RoleHandle,
        RolePlan,
        WeightSource,
    )
    from torch import Tensor

    from distill_diffusers.architecture import Architecture
    from distill_diffusers.weights.starts import Start


class DiffusersConfig(Protocol):
    """What the shared code reads of a family's section of a run file."""

    @property
    def num_frames(self) -> int:
        """Frames of pixels of a clip; 1 of an image model."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def components(self) -> str | None:
        """Folder or hub id of VAE, encoders and tokenizers; None: the path of the first role."""
        ...

    @property
    def cfg_batched(self) -> bool:
        """Whether a guided call in training is one of twice the batch."""
        ...


ConfigT = TypeVar("ConfigT", bound=DiffusersConfig)

ROLE_OPTIONS = frozenset(
    (
        "activation_checkpointing",
        "attention_backend",
        "base",
        "compile",
        "fsdp",
        "heads",
        "lora",
        "offload",
    )
)
"""The options of a role that ``RoleLoader`` honours for every model class. A family that honours
more overrides ``role_options``, and ``load`` and ``plan`` where it does so."""

CAPABILITIES = Capabilities(
    supports_cfg=True,
    supports_decode=True,
    supports_features=True,
    supports_jvp=True,
    supported_pred_types=frozenset({"v", "x0", "eps"}),
    solvers=frozenset({"euler", "unipc"}),
)
"""Those of every ``FlowMatchingAdapter`` that defines where its hidden states are."""


@runtime_checkable
class WarningExporter(Protocol):
    """An exporter that knows what its readers will not do, as ``PipelineExporter``."""

    def warnings(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Yield it, before there are weights."""
        ...


class DiffusersFamily(FamilyPlugin[ConfigT]):
    """Base class of the plugins of families on diffusers; see the module.

    Attributes:
        kind: the model class.
        published: hub id -> numbers of a published pipeline, so that a run of it can be checked
            and planned before it is downloaded.
    """

    kind: ClassVar[ModelKind]
    planned_kind: ClassVar[ModelKind | None] = None
    """``kind`` with a transformer that runs on fake tensors and takes the same memory; None: its
    own does."""
    published: ClassVar[Mapping[str, PublishedModel]] = EMPTY
    original_folders: ClassVar[Mapping[str, str]] = EMPTY
    """By module, the folder that the model's original code keeps an expert in."""

    # -- hooks: what a family defines of its own ------------------------------------------------

    @abstractmethod
    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        """Read off ``vae/config.json`` what the VAE makes of pixels."""

    @abstractmethod
    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call the transformer of ``role`` as the adapter does, and give its output.

        It is called on fake tensors to plan the memory of a call. ``role`` has no call options.

        Args:
            inputs: by name, with the shapes of ``call_shapes``.
        """

    def original_name(self, name: str) -> str:
        """Give the original code's name of a weight; by default it is ours."""
        return name

    def unsupported(self, model: ModelDescription, config: ConfigT) -> Iterable[str]:
        """Say why the adapter would call ``model`` wrongly. Such a model is never loaded."""
        return ()

    def clip_problems(
        self, config: ConfigT, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterable[str]:
        """Say where the clips of ``config``, a VAE and a transformer do not fit each other.

        Args:
            latents: of the VAE.
            transformer: its configuration, of a published model what differs from the defaults.
        """
        return ()

    def fit_problems(
        self, role: RoleSpec, config: ConfigT, model: ModelDescription
    ) -> Iterator[str]:
        """Say why ``model``, the supported model of ``role``, does not fit the run; by default
        ``clip_problems``."""
        latents = self.latents(config.components or role.path)
        if latents is not None:
            yield from self.each_clip_problem(config, latents, model.main)

    def each_clip_problem(
        self, config: ConfigT, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        """Say the ``clip_problems`` of all sizes of clips, and of which each is."""
        shapes = self.clip_shapes(config)
        for clip in shapes:
            size = f"clips of {' x '.join(map(str, clip))}: " if len(shapes) > 1 else ""
            one = self.config_of_clip(config, clip)
            for problem in self.clip_problems(one, latents, transformer):
                yield f"{size}{problem}"

    def condition_rows(
        self, transformer: Mapping[str, object], config: ConfigT
    ) -> Mapping[str, tuple[int, ...]]:
        """Give the shapes of ``condition_shapes`` from the configuration of the transformer.

        A family whose shapes depend on more overrides ``condition_shapes``.
        """
        return EMPTY

    def call_shapes(
        self, role: RoleSpec, config: ConfigT, latents: tuple[int, int, int, int]
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Give the shapes of one row of all inputs of a call, by name; None where not known.

        By default ``latents`` [C, T, H, W], ``t`` [] and the tensors of the condition.
        """
        return {"latents": latents, "t": (), **self.condition_shapes(config, source=role.path)}

    def tokens(
        self, architecture: Architecture, latents: tuple[int, int, int, int]
    ) -> tuple[int, int, int]:
        """Give (T, H, W) of a clip in tokens of the transformer; by default from its patch size."""
        from distill_diffusers.architecture import patch_size

        _, *cells = latents
        frames, height, width = (
            n // p for n, p in zip(cells, patch_size(architecture.config), strict=True)
        )
        return frames, height, width

    def attention_problem(self, role: RoleSpec, config: ConfigT) -> str | None:
        """Say why ``role.attention_backend`` cannot be had for the role; None where it can."""
        from distill_diffusers.roles.attention import backend_problem

        backend = role.attention_backend
        return None if backend is None else backend_problem(self.kind, backend)

    # -- what it can do -----------------------------------------------------------------------

    def capabilities(self, config: ConfigT) -> Capabilities:
        """Give those of every ``FlowMatchingAdapter``; a family that has more overrides it."""
        return evolve(CAPABILITIES, supports_exits=bool(self.kind.time_embedder))

    def role_options(self, config: ConfigT) -> Collection[str]:
        """Give ``ROLE_OPTIONS``, and ``experts`` of a kind that has several modules."""
        return ROLE_OPTIONS | {EXPERTS} if len(self.kind.modules) > 1 else ROLE_OPTIONS

    def attention_backends(self, role: RoleSpec, config: ConfigT) -> Collection[str]:
        """Give the kernels of diffusers that the transformer can use with the installed
        packages."""
        from distill_diffusers.roles.attention import available_backends

        return available_backends(self.kind)

    def export_formats(self) -> Mapping[str, str]:
        return FORMATS

    def components(self, config: ConfigT) -> str | None:
        return config.components

    # -- what is wrong with a run -------------------------------------------------------------

    def role_problems(self, role: RoleSpec, config: ConfigT) -> Iterator[Problem]:
        """Report problems of a role's path, experts, LoRA, discriminator and attention.

        A hub id that is not in the local cache is no problem if its numbers are published: the run
        can be planned, and ``load`` states what to download.
        """
        if role.heads is not None:
            yield from below(self.discriminator_problems(role, config), "heads")
            return
        yield from (Problem("path", text) for text in self._path_problems(role, config))
        yield from self._expert_problems(role, config)
        yield from below(self._lora_problems(role), "lora")
        if role.attention_backend is not None and (text := self.attention_problem(role, config)):
            yield Problem("attention_backend", text)

    def discriminator_problems(self, role: RoleSpec, config: ConfigT) -> Iterator[Problem]:
        """Report blocks that the model does not have; paths are keys of ``heads``."""
        assert role.heads is not None
        with suppress(
            WeightsError
        ):  # nothing describes how it is built: a problem of the other role
            from distill_diffusers.architecture import inspect_model
            from distill_diffusers.roles.discriminator import block_problems

            architecture = inspect_model(self.kind, self.describe(role.path).main)
            yield from block_problems(role.heads, len(architecture.blocks))

    def config_problems(self, config: ConfigT, roles: Collection[str]) -> Iterator[Problem]:
        """Report what is wrong with the folder that the components come from."""
        path = config.components
        if path is None:
            return
        if problem := self._location_problem(path):
            yield Problem("components", problem)
        folder = locate(path)
        if folder is not None and not is_hub_id(path):
            yield from (Problem("components", text) for text in component_problems(folder))
        yield from (Problem("components", text) for text in self._statistics_problems(path))

    def weights_problems(self, role: RoleSpec, path: str) -> Iterator[str]:
        """Report entries of the configurations that differ, such as how many heads share one
        width."""
        with suppress(WeightsError):  # no configuration: names and shapes of the weights must do
            theirs = self.describe(path).transformers
            ours = self.describe_role(role).transformers
            for name in theirs.keys() & ours.keys():
                if differ := differing_entries(theirs[name], ours[name]):
                    yield (
                        f"{path} is another model than {role.path}: {name} has "
                        f"{'; '.join(differ)}. Its weights may fit, and would be called wrongly. "
                        "Name the path of the same model"
                    )

    def start_problems(self, role: RoleSpec, config: ConfigT, path: str) -> Iterable[str]:
        """Report what is wrong with weights to start from, of whichever code."""
        try:
            start = self._find_start(path)
            if start is not None:
                self.start_weights(role, path)
                return
        except WeightsError as error:
            yield str(error)
            return
        yield from super().start_problems(role, config, path)

    def starts_with_adapters(self, path: str) -> bool:
        try:
            start = self._find_start(path)
        except WeightsError:
            return False  # a problem that ``start_problems`` reports
        return start is not None and start.is_lora

    def export_problems(self, role: RoleSpec, request: ExportRequest) -> Iterable[Problem]:
        configs: Iterable[Mapping[str, object]] = ()
        modules: Collection[str] = ()
        others: Collection[str] = ()
        with suppress(WeightsError):  # nothing states how it is built: a problem of the role's path
            transformers = self.describe_role(role).transformers
            configs, modules = transformers.values(), transformers.keys()
            others = self.describe(role.path).transformers.keys() - modules

        def max_rank() -> int | None:
            from distill_diffusers.architecture import inspect_model

            layers = [inspect_model(self.kind, config).linear_layers for config in configs]
            return max((min(size) for sizes in layers for size in sizes.values()), default=None)

        return export_problems(
            role,
            request,
            formats=self.export_formats(),
            modules=modules,
            others=others,
            max_rank=max_rank,
        )

    def export_warnings(
        self, role: RoleSpec, config: ConfigT, request: ExportRequest, *, source: str
    ) -> Iterator[str]:
        exporter = self.exporter(config, source=source)
        if isinstance(exporter, WarningExporter):
            yield from exporter.warnings(role, request)

    # -- shapes and numbers, without weights --------------------------------------------------

    def describe(self, path: str) -> ModelDescription:
        """Describe the model of a folder or hub id.

        Raises:
            WeightsError: nothing describes how it is built.
        """
        return describe_model(self.kind, path, self.published)

    def describe_role(self, role: RoleSpec) -> ModelDescription:
        """Describe the model of ``role`` with the transformers that the role has.

        Raises:
            WeightsError: nothing states how it is built, or it has no such expert.
        """
        model = choose_experts(self.describe(role.path), role)
        return model if role.target_time is None else as_flow_map(model, role.target_time)

    def latents(self, source: str) -> LatentInfo | None:
        """Say what the VAE of a folder or hub id makes of pixels; None where it is not known, or
        its configuration is damaged, which is a problem of the folder."""
        folder = locate(source)
        if folder is not None and (folder / "vae" / "config.json").is_file():
            try:
                return self.latent_info(read_config(folder / "vae" / "config.json"))
            except WeightsError:
                return None
        return self.published[source].latents if source in self.published else None

    def latent_shape(self, config: ConfigT, *, source: str) -> tuple[int, int, int, int] | None:
        """Give (C, T, H, W) from the numbers of ``source``'s VAE."""
        info = self.latents(source)
        return info and info.shape(config.num_frames, config.height, config.width)

    def clip_shapes(self, config: ConfigT) -> tuple[tuple[int, int, int], ...]:
        if isinstance(config, ClipConfig) and config.buckets:
            return tuple((b.num_frames, b.height, b.width) for b in config.buckets)
        return ((config.num_frames, config.height, config.width),)

    def config_of_clip(self, config: ConfigT, clip: tuple[int, int, int]) -> ConfigT:
        if not isinstance(config, ClipConfig) or not config.buckets:
            return config
        frames, height, width = clip
        return config.of_bucket(BucketConfig(num_frames=frames, height=height, width=width))

    def count_tokens(
        self, config: ConfigT, captions: Sequence[str], *, source: str
    ) -> CaptionTokens | None:
        """Count those of ``tokenizer``, whose length ``text_settings`` states."""
        limit = self.text_settings(config).get("text_encoder.length")
        folder = locate(source)
        if not isinstance(limit, int) or folder is None or not (folder / "tokenizer").is_dir():
            return None
        from distill_diffusers.components.encoders import count_tokens

        return count_tokens(folder / "tokenizer", captions, limit)

    def text_settings(self, config: ConfigT) -> Mapping[str, object]:
        """Say what a text's embedding depends on beside encoders and tokenizers, by entry of the
        fingerprint: ``{"text_encoder.length": 512, "text_encoder.precision": "bf16"}``. The
        adapter gives its ``TextEncoders`` the same."""
        return EMPTY

    def fingerprint(self, config: ConfigT, *, source: str) -> Fingerprint:
        """Name the VAE, and all text encoders of ``source``."""
        parts = text_encoder_folders(source)
        return {
            **latent_fingerprint(source),
            **condition_fingerprint(source, parts, self.text_settings(config)),
        }

    def condition_shapes(self, config: ConfigT, *, source: str) -> Mapping[str, tuple[int, ...]]:
        """Give ``condition_rows`` of the model; none where nothing describes how it is built, which
        is a problem of the role's path."""
        try:
            return self.condition_rows(self.describe(source).main, config)
        except WeightsError:
            return EMPTY

    def plan(self, role: RoleSpec, config: ConfigT) -> RolePlan:
        """Plan modules and sizes, from the meta device.

        Raises:
            WeightsError: nothing describes how the model is built.
        """
        from distill_protocols import RolePlan

        from distill_diffusers.planning.modules import plan_modules

        model = self.describe_role(role)
        folder = locate(role.path)
        is_present = folder is not None and all(
            has_weights(folder / name, DIFFUSERS_STEM) for name in model.transformers
        )
        return RolePlan(
            role=role.name,
            source=role.path if role.heads is None else "drawn from the seed",
            modules=plan_modules(self.kind, model, role),
            present=is_present or role.heads is not None,
        )

    def plan_call(
        self,
        role: RoleSpec,
        config: ConfigT,
        *,
        source: str,
        batch: int,
        guided: bool = False,
        input_gradient: bool = False,
    ) -> CallPlan | None:
        """Plan a call by the real module on fake tensors, of three blocks in each list.

        Of two experts it is either's call. A guided one is of the conditions of both sides, unless
        guidance is an input of the models.
        """
        latents = self.latent_shape(config, source=source)
        if latents is None:
            return None
        from distill_diffusers.architecture import inspect_model
        from distill_diffusers.planning.calls import plan_call, plan_discriminator_call

        main = self.describe(role.path).main
        if role.heads is not None:
            cells = self.tokens(inspect_model(self.kind, main), latents)
            return plan_discriminator_call(self.kind, main, role, batch=batch, cells=cells)
        shapes = self.call_shapes(role, config, latents)
        if shapes is None:
            return None
        both = guided and config.cfg_batched and not self.capabilities(config).embeds_guidance
        rows = 2 * batch if both else batch
        return plan_call(
            self.planned_kind or self.kind,
            main,
            role,
            self.call_model,
            {name: (rows, *shape) for name, shape in shapes.items()},
            input_gradient=input_gradient,
        )

    # -- parts of a run -----------------------------------------------------------------------

    def load(
        self,
        roles: Sequence[RoleSpec],
        config: ConfigT,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        from distill_diffusers.roles.loading import RoleLoader

        def describe(path: str) -> ModelDescription:
            model = self.describe(path)
            for reason in self.unsupported(model, config):
                raise WeightsError(f"{path} cannot be used: {reason}")
            return model

        return RoleLoader(kind=self.kind, describe=describe).load_bundle(
            roles, device=device, seed=seed, weights=weights, shard=shard
        )

    def weights(self, path: str) -> Mapping[str, WeightSource]:
        from distill_diffusers.weights.sources import folder_weights

        return folder_weights(path, self.kind.modules, has_index=self.kind.has_index)

    def start_weights(self, role: RoleSpec, path: str) -> Mapping[str, WeightSource]:
        """Open weights to start from: a pipeline folder or hub id, or what ``weights.starts``
        reads. Names and shapes are compared with the role's model."""
        from distill_diffusers.architecture import build_on_meta, inspect_model
        from distill_diffusers.lora import adapted_layers
        from distill_diffusers.roles.target_time import with_target_embedder
        from distill_diffusers.weights import starts
        from distill_diffusers.weights.modules import ALL_OR_NOTHING, check_keys
        from distill_diffusers.weights.sources import folder_weights

        start = self._find_start(path)
        if start is None:
            modules = role.experts or self.kind.modules
            return folder_weights(path, modules, has_index=self.kind.has_index)
        configs = self.describe_role(role).transformers
        start = starts.choose_files(start, configs, role)
        names = self._foreign_names()
        sources: dict[str, WeightSource] = {}
        for module, config in configs.items():
            if module not in start.files:
                own = folder_weights(role.path, (module,), has_index=self.kind.has_index)
                sources[module] = own[module]
                continue
            state = build_on_meta(self.kind, config).state_dict()
            if not start.is_lora:
                whole = starts.whole_weights(start, module, names)
                if role.target_time is not None:
                    whole = with_target_embedder(self.kind, whole)
                sources[module] = whole
                check_keys(sources[module], state, ALL_OR_NOTHING)
                continue
            lora = starts.read_lora(start, module, state, names, self.original_name)
            if role.lora is None:
                base = folder_weights(role.path, (module,), has_index=self.kind.has_index)[module]
                sources[module] = starts.PatchedWeights(base, lora)
            else:
                layers = adapted_layers(inspect_model(self.kind, config), role.lora)
                starts.check_is_roles_lora(lora, role.lora, layers)
                sources[module] = starts.LoraAdapters(lora, role.lora.scale)
        return sources

    # -- helpers ------------------------------------------------------------------------------

    def _find_start(self, path: str) -> Start | None:
        from distill_diffusers.weights.starts import find_start

        return find_start(path, self.kind.modules, self.original_folders)

    def _foreign_names(self) -> ForeignNames | None:
        try:
            return self.foreign_names()
        except PluginError:
            return None

    def _path_problems(self, role: RoleSpec, config: ConfigT) -> Iterable[str]:
        """Report what is missing or damaged, and where clip and model do not fit."""
        path = role.path
        missing = [problem] if (problem := self._location_problem(path)) else []
        folder = locate(path)
        if folder is not None and not is_hub_id(path):
            with_components = config.components is None
            chosen = tuple(name for name in self.kind.modules if name in role.experts)
            modules = chosen or self.kind.modules
            missing += pipeline_problems(
                folder, modules, components=with_components, has_index=self.kind.has_index
            )
        if config.components is None:
            missing += self._statistics_problems(path)
        if missing:
            return missing
        try:
            model = self.describe(path)
            reasons = [f"{path}: {reason}" for reason in self.unsupported(model, config)]
            return reasons or list(self.fit_problems(role, config, model))
        except WeightsError as error:
            return [str(error)]

    def _expert_problems(self, role: RoleSpec, config: ConfigT) -> Iterator[Problem]:
        """Report experts that the model does not have."""
        with suppress(WeightsError):  # nothing states how it is built: a problem of the path
            model = self.describe(role.path)
            ranges = self.expert_ranges(evolve(role, experts=()), config)
            for text in expert_problems(model, role, ranges):
                yield Problem("experts", text)

    def _statistics_problems(self, path: str) -> Iterator[str]:
        """Report what the latents of ``path``'s VAE could not be normalised by."""
        folder = locate(path)
        if folder is None:
            return
        # A VAE that is not there, or not whole, is a problem of its own.
        with suppress(WeightsError, UnreadableFileError):
            info = self.latents(path)
            statistics = latent_statistics(folder / "vae")
            if info is not None:
                yield from statistics_problems(str(folder / "vae"), statistics, info.channels)

    def _location_problem(self, path: str) -> str | None:
        """Say why nothing is known of ``path``."""
        if is_hub_id(path) and path not in self.published and locate(path) is None:
            return unknown_hub_id(path, self.published)
        return folder_problem(path)

    def _lora_problems(self, role: RoleSpec) -> Iterator[Problem]:
        """Report targets that name no linear layer of the role's model."""
        if role.lora is None or not role.lora.target_modules:
            return
        with suppress(WeightsError):  # nothing describes how it is built: a problem of the path
            from distill_diffusers.architecture import inspect_model
            from distill_diffusers.lora import target_problems

            for config in self.describe_role(role).transformers.values():
                architecture = inspect_model(self.kind, config)
                for text in target_problems(architecture, role.lora, self.kind.foreign_layers):
                    yield Problem("target_modules", text)
