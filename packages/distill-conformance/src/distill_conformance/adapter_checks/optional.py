"""Optional contracts: stated exactly where they exist, and true where they are stated."""

from __future__ import annotations

import torch
from attrs import evolve
from distill_protocols import (
    EXIT_EMBEDDING,
    Capabilities,
    CapabilityError,
    ConditioningError,
    ContractError,
    DiscriminatorSpec,
    ExitSpec,
    RoleSpec,
)
from torch import Tensor

from distill_conformance.adapter_case import ROWS, AdapterCase, counted_calls, normal
from distill_conformance.failures import REFUSALS, applies_if, must_raise, require, require_shape


def check_capabilities(case: AdapterCase) -> None:
    """Optional contracts are None exactly where the capability is not stated, and plugin and
    adapter state the same.

    A method is admitted by what is stated, and fails in its first step where that is not there.
    """
    stated, adapter = case.capabilities, case.adapter
    require(isinstance(stated, Capabilities), "capabilities() gives no Capabilities")
    require(
        stated == adapter.capabilities,
        f"the plugin states {stated}, and the adapter {adapter.capabilities}",
    )
    for name, contract, there in (
        ("supports_kv_cache", "causal", adapter.causal),
        ("supports_expert_routing", "experts", adapter.experts),
        ("supports_image_condition", "images", adapter.images),
        ("supports_features", "discriminators", adapter.discriminators),
        ("supports_jvp", "tangents", adapter.tangents),
        ("supports_exits", "exits", adapter.exits),
        ("supports_flow_maps", "flow_maps", adapter.flow_maps),
        ("supports_latent_parts", "parts", adapter.parts),
    ):
        require(
            (there is not None) == (not stated.missing([name])),
            f"{name} is {not stated.missing([name])}, and adapter.{contract} is {there!r}",
        )
    require("v" in stated.supported_pred_types, "every family predicts v")
    unknown = sorted(stated.causal_roles - case.bundle.roles.keys())
    require(not unknown, f"causal_roles names {unknown}, which are no roles of the run")
    require(
        not stated.causal_roles or stated.supports_kv_cache,
        f"the roles {sorted(stated.causal_roles)} are causal without supports_kv_cache",
    )


def check_frame_times(case: AdapterCase) -> None:
    """A time for each frame is read: equal times give what one time gives, others do not.

    Diffusion forcing trains with a noise level for each chunk.
    """
    case.need("supports_frame_times")
    cond, x_t = case.condition(), case.noise()
    frames = x_t.shape[2]
    for role in case.model_roles:
        for t in case.times(role):
            by_frame = t[:, None].expand(ROWS, frames).contiguous()
            with torch.no_grad():
                one = case.adapter.forward(role, x_t, t, cond)
                many = case.adapter.forward(role, x_t, by_frame, cond)
                case.require_close(many, one, f"one time for all frames of {role!r}, by frame")
                if frames == 1:
                    continue
                other = by_frame.clone()
                other[:, -1] = t.flip(0)
                changed = case.adapter.forward(role, x_t, other, cond)
            require(not torch.equal(changed, many), f"the time of the last frame of {role!r} is "
                    "not read")  # fmt: skip
            noised = case.adapter.add_noise(x_t, case.noise(seed=3), other)
            first = case.adapter.add_noise(x_t, case.noise(seed=3), t)
            case.require_close(noised[:, :, 0], first[:, :, 0], "noise of a time for each frame")
        missing = torch.zeros(ROWS, frames + 1)
        with must_raise(REFUSALS, "a time for each frame, and one too many"):
            case.adapter.forward(role, x_t, missing, cond)


def check_features(case: AdapterCase) -> None:
    """Features are [B, D, T', H', W'] of the block asked for, row by row, and take gradient.

    A discriminator learns from them, and a student through them.
    """
    case.need("supports_features")
    cond = case.condition()
    for role in case.model_roles:
        if role in case.causal_roles:
            continue
        t = case.times(role)[0]
        with case.clean_gradients():
            x_t = case.noise().requires_grad_()
            features = _features(case, role, x_t, t)
            require(
                features.dim() == 5 and len(features) == ROWS and features.dtype == torch.float32,
                f"features of {role!r} are {list(features.shape)} {features.dtype}; they must be "
                f"fp32 [{ROWS}, D, T', H', W']",
            )
            require(features.requires_grad, f"features of {role!r} have no gradient")
            features.square().mean().backward()
            require(
                x_t.grad is not None and bool(x_t.grad.abs().sum() > 0),
                f"no gradient of the features of {role!r} reaches x_t",
            )
        with torch.no_grad():
            alone = _features(case, role, case.noise()[:1], t[:1], rows=1)
            case.require_close(features[:1].detach(), alone, f"features of {role!r} alone")
            plain = case.adapter.forward(role, case.noise(), t, cond)
            filled: dict[int, Tensor | None] = {0: None}
            beside = case.adapter.forward(role, case.noise(), t, cond, features=filled)
        case.require_close(beside, plain, f"the prediction of {role!r} beside its features")
        with must_raise(ContractError, f"features of a block that {role!r} does not have"):
            case.adapter.forward(role, case.noise(), t, cond, features={10_000: None})
        if not case.capabilities.missing(["supports_cfg"]):
            with must_raise(CapabilityError, "features of a call with guidance"):
                case.adapter.forward(
                    role, case.noise(), t, cond, cfg=3.0, neg_cond=case.negative,
                    features={0: None},
                )  # fmt: skip


def check_discriminator(case: AdapterCase) -> None:
    """A discriminator gives a logit of a row for each block, from that row alone, and its loss
    reaches its own weights and the features.
    """
    case.need("supports_features")
    applies_if("heads" in case.plugin.role_options(case.config), "the family has no discriminators")
    plain = [n for n in case.model_roles if n not in case.causal_roles]
    applies_if(bool(plain), "all roles are causal, and a discriminator reads whole clips")
    model = case.spec(plain[0])
    spec = DiscriminatorSpec(on=model.name, blocks=(0,), width=8)
    role = RoleSpec(name="judge", path=model.path, trainable=True, heads=spec)
    causal = [s for s in case.roles if s.name in case.causal_roles]
    models = case.load([model, role, *causal])
    handle = models.bundle["judge"]
    require(handle.discriminator == spec, "RoleHandle.discriminator is not the role's spec")
    judge = models.adapter.discriminators
    require(judge is not None, "supports_features is stated, and discriminators is None")
    assert judge is not None
    features = _features(case, model.name, case.noise(), case.times(model.name)[0]).detach()
    features.requires_grad_()
    logits = judge.discriminate("judge", {0: features})
    require_shape(logits, (ROWS, 1), "logits of a discriminator of one block")
    require(logits.requires_grad, "the logits have no gradient")
    logits.square().mean().backward()
    require(
        features.grad is not None and bool(features.grad.abs().sum() > 0),
        "no gradient of the logits reaches the features",
    )
    require(
        any(
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for module in handle.modules.values()
            for p in module.parameters()
        ),
        "no gradient of the logits reaches the discriminator",
    )
    with torch.no_grad():
        alone = judge.discriminate("judge", {0: features[:1]})
    case.require_close(logits[:1].detach(), alone, "the logits of a row alone")
    with must_raise(ContractError, "features of another block than the discriminator's"):
        judge.discriminate("judge", {1: features})
    with must_raise(ContractError, f"discriminate with {model.name!r}, which is a model"):
        judge.discriminate(model.name, {0: features})


def check_exits(case: AdapterCase) -> None:
    """A role that is told exit steps begins, bit for bit, as one that is not; then each row reads
    its own exit, and a call without exits is that of its transformer.

    A critic that mixed them up would follow another distribution than the student's.
    """
    case.need("supports_exits")
    spec = evolve(case.trained_role, exits=ExitSpec(count=3))
    applies_if(spec.name not in case.causal_roles, "the trained role is causal")
    models = case.load_with(spec, perturb=False)
    exits = models.adapter.exits
    require(exits is not None, "supports_exits is stated, and exits is None")
    assert exits is not None
    counts = {name: exits.exit_count(name) for name in case.model_roles}
    expected = {name: 3 if name == spec.name else 0 for name in case.model_roles}
    require(counts == expected, f"exit_count is {counts}, and must be {expected}")
    embedding = models.bundle[spec.name].modules.get(EXIT_EMBEDDING)
    require(embedding is not None, f"there is no module {EXIT_EMBEDDING!r}")
    assert embedding is not None
    cond, x_t, t = case.condition(), case.noise(), case.times(spec.name)[0]

    def call(steps: Tensor, rows: slice = slice(None)) -> Tensor:
        return exits.forward_at_exits(spec.name, x_t[rows], t[rows], cond[rows], exits=steps)

    plain = models.adapter.forward(spec.name, x_t, t, cond).detach()
    first = call(torch.tensor([[2]]))
    require(torch.equal(first.detach(), plain), "an embedding of zero changes the prediction")
    first.square().mean().backward()
    moved = {
        name: parameter.grad.abs().flatten(1).sum(dim=1) > 0
        for name, parameter in embedding.named_parameters()
        if parameter.grad is not None
    }
    require(
        [row.tolist() for row in moved.values()] == [[False, False, True]],
        f"the loss of clips of exit 2 reaches these rows of the embedding: {moved}",
    )
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.copy_(normal(*parameter.shape, seed=9))
        steps = torch.arange(ROWS)[:, None] % 3
        together = call(steps)
        require(
            torch.equal(models.adapter.forward(spec.name, x_t, t, cond), plain),
            "a call without exits reads the embedding",
        )
        for row in range(ROWS):
            alone = slice(row, row + 1)
            case.require_close(together[alone], call(steps[alone], alone), "a row's exit, alone")
        require(not torch.allclose(call(steps.flip(0)), together), "the exit of a row is not read")
        if not case.capabilities.missing(["supports_frame_times"]) and x_t.shape[2] > 1:
            by_frame = steps.expand(ROWS, x_t.shape[2]).clone()
            case.require_close(call(by_frame), together, "one exit for all frames, by frame")
            by_frame[:, -1] = (by_frame[:, -1] + 1) % 3
            require(not torch.allclose(call(by_frame), together), "the last frame's is not read")
        with must_raise(ContractError, "exits of one clip too many"):
            call(torch.zeros(ROWS + 1, 1, dtype=torch.int64))
        others = [name for name in case.model_roles if name != spec.name]
        for name in others[:1]:
            with must_raise(ContractError, f"exits of {name!r}, which knows none"):
                exits.forward_at_exits(name, x_t, t, cond, exits=steps)


def check_tangents(case: AdapterCase) -> None:
    """``forward_jvp`` gives the prediction and its derivative along (dx, dt), without gradient.

    Compared with central differences, along x, along t and along both.
    """
    case.need("supports_jvp")
    tangents = case.adapter.tangents
    require(tangents is not None, "supports_jvp is stated, and tangents is None")
    assert tangents is not None
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        if role in case.causal_roles:
            continue
        for t in case.times(role):
            for dx, dt in (
                (case.noise(seed=4), torch.zeros(ROWS)),
                (torch.zeros_like(x_t), torch.tensor([10.0, -7.0])),
                (case.noise(seed=4), torch.tensor([5.0, 3.0])),
            ):
                v, derivative = tangents.forward_jvp(role, x_t, t, cond, dx=dx, dt=dt)
                require(not derivative.requires_grad, "forward_jvp keeps a graph")
                with torch.no_grad():
                    plain = case.adapter.forward(role, x_t, t, cond)
                    h = 0.02
                    above, below = (
                        case.adapter.forward(role, x_t + s * h * dx, t + s * h * dt, cond)
                        for s in (1, -1)
                    )
                case.require_close(v, plain, f"the prediction of {role!r} from forward_jvp")
                difference = (above.double() - below.double()) / (2 * h)
                error = (derivative.double() - difference).norm() / difference.norm()
                require(
                    float(error) < 0.03,
                    f"the derivative of {role!r} is off by {float(error):.1%} from central "
                    "differences",
                )


def check_experts(case: AdapterCase) -> None:
    """Several ranges fill [0, 1000], a call goes to the module that ``expert_of`` names, and the
    plugin plans the same.

    Otherwise one expert trains at times at which the other is sampled.
    """
    case.need("supports_expert_routing")
    experts = case.adapter.experts
    require(experts is not None, "supports_expert_routing is stated, and experts is None")
    assert experts is not None
    cond, x_t = case.condition(), case.noise()
    for role in case.model_roles:
        ranges = experts.expert_ranges(role)
        _require_filled(ranges, f"expert_ranges of {role!r}")
        planned = case.plugin.expert_ranges(case.spec(role), case.config)
        if planned:
            _require_filled(tuple(sorted(planned.values())), f"planned ranges of {role!r}")
        require(
            not planned or planned.keys() <= case.bundle[role].modules.keys(),
            f"the plugin plans ranges of {sorted(planned)}, which are no modules of {role!r}",
        )
        require(
            len(planned or (1,)) == len(ranges),
            f"the plugin plans {len(planned)} ranges of {role!r}, the adapter has {len(ranges)}",
        )
        for (low, high), t in zip(ranges, case.times(role), strict=True):
            name = experts.expert_of(role, t)
            require(
                not planned or planned[name] == (low, high),
                f"{role!r} at {t.tolist()} goes to {name}, planned for {planned.get(name)}",
            )
            at_edge = experts.expert_of(role, torch.full((1,), low))
            require(at_edge == name, f"t = {low:g} of {role!r} belongs to the range above it")
            with torch.no_grad(), counted_calls(case.bundle[role]) as calls:
                case.adapter.forward(role, x_t, t, cond)
            called = {key for key, _ in calls}
            require(called == {name}, f"{role!r} at {t.tolist()} calls {called}, not {name}")
        if len(ranges) > 1:
            mixed = torch.tensor([ranges[0][0] + 1, ranges[-1][1] - 1])
            with must_raise(ContractError, f"a call of {role!r} at times of two experts"):
                case.adapter.forward(role, x_t, mixed, cond)
    joint = experts.expert_ranges(*case.model_roles)
    _require_filled(joint, "expert_ranges of all roles")


def _require_filled(ranges: tuple[tuple[float, float], ...], what: str) -> None:
    ends = [end for _, end in ranges]
    starts = [start for start, _ in ranges]
    # A single range may be that of a model that knows some t alone.
    is_filled = starts == [0, *ends[:-1]] and ends[-1:] == [1000]
    is_single = len(ranges) == 1 and starts[0] >= 0 and ends[0] <= 1000
    require(
        (is_filled or is_single) and all(a < b for a, b in ranges),
        f"{what} are {ranges}; they must rise and fill [0, 1000], or be one within",
    )


def check_images(case: AdapterCase) -> None:
    """A picture adds tensors and changes the prediction; a frame that it gives is kept.

    Otherwise image-to-video training learns to ignore the picture, or has a loss on it.
    """
    case.need("supports_image_condition")
    text = case.condition(image=False)
    try:
        pictured = case.with_pictures(text)
    except ConditioningError:
        applies_if(False, "the models of this case read no picture, and declare it")
        return
    added = sorted(pictured.tensors.keys() - text.tensors.keys())
    require(bool(added), "with_image adds no tensor to the condition")
    require(
        all(len(value) == ROWS for value in pictured.tensors.values()),
        "a tensor of a condition with pictures has not one row a prompt",
    )
    other = case.with_pictures(text, seed=8)
    _, height, width = case.clip_shape
    with must_raise(ConditioningError, "a picture of another size than the clips"):
        case.images.with_image(text, normal(ROWS, 3, height + 8, width).sigmoid())
    mask = case.images.trained_frames(pictured)
    for role in case.model_roles:
        t = case.times(role)[0]
        with torch.no_grad():
            outputs = [
                case.adapter.forward(role, case.noise(), t, cond, fwd_pred_type="x0")
                for cond in (pictured, other)
            ]
        require(not torch.equal(*outputs), f"the picture has no effect on role {role!r}")
        if mask is None:
            continue
        frames = case.adapter.latent_shape[1]
        require_shape(mask, (1, 1, frames, 1, 1), "trained_frames")
        require(bool(((mask == 0) | (mask == 1)).all()), "trained_frames holds 0 and 1 alone")
        require(bool((mask == 0).any()), "trained_frames is None where everything is predicted")
        with torch.no_grad():
            again = case.adapter.forward(role, case.noise(seed=6), t, pictured, fwd_pred_type="x0")
        case.require_close(
            (1 - mask) * again, (1 - mask) * outputs[0], "x0 of a frame that the condition gives"
        )


def check_needs_image(case: AdapterCase) -> None:
    """A role that needs a picture is refused without one, with ``ConditioningError``."""
    needy = [
        spec.name
        for spec in case.roles
        if spec.heads is None and case.plugin.frame_conditions(spec, case.config).least
    ]
    applies_if(bool(needy), "no role needs a picture")
    text = case.condition(image=False)
    for role in needy:
        with must_raise(ConditioningError, f"a call of {role!r} without a picture"):
            case.adapter.forward(role, case.noise(), case.times(role)[0], text)


def check_undeclared_options(case: AdapterCase) -> None:
    """What is not stated is refused, and not silently something else."""
    stated, role = case.capabilities, case.model_roles[0]
    cond, x_t, t = case.condition(), case.noise(), case.times(role)[0]
    checked = False
    for kind in ("x0", "eps"):
        if kind not in stated.supported_pred_types:
            checked = True
            with must_raise(REFUSALS, f"a prediction of type {kind}, which is not stated"):
                case.adapter.forward(role, x_t, t, cond, fwd_pred_type=kind)
    if not stated.supports_features:
        checked = True
        with must_raise(REFUSALS, "features, which are not stated"):
            case.adapter.forward(role, x_t, t, cond, features={0: None})
    if not stated.supports_frame_times:
        checked = True
        with must_raise(REFUSALS, "a time for each frame, which is not stated"):
            case.adapter.forward(role, x_t, t[:, None].expand(-1, x_t.shape[2]), cond)
    applies_if(checked, "the family states all of it")


def _features(case: AdapterCase, role: str, x_t: Tensor, t: Tensor, *, rows: int = ROWS) -> Tensor:
    features: dict[int, Tensor | None] = {0: None}
    case.adapter.forward(role, x_t, t, case.condition()[:rows], features=features)
    found = features[0]
    require(found is not None, f"forward leaves the features of block 0 of {role!r} None")
    assert found is not None
    return found
