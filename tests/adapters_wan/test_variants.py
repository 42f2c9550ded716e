"""Two experts, first frames, per-token timesteps: against the stock pipelines and by hand."""

from __future__ import annotations

import contextlib
import itertools
import json
from functools import partial

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_adapters_wan.experts import Experts, boundary_of, module_ranges, ranges
from distill_diffusers.lora import base_name
from distill_protocols import (
    Condition,
    ConditioningError,
    ContractError,
    ExportRequest,
    LoraSpec,
    ModelBundle,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    TensorWeights,
    WeightsError,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wan_variants import VARIANTS, build

CPU = torch.device("cpu")
PROMPTS = ["a seven moving left", "a & seven"]
EVERY = pytest.mark.parametrize("name", list(VARIANTS))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def loaded(folder_of):
    """name -> (adapter, bundle) with a frozen role ``student``; tests must not change it."""
    bundles = {}

    def make(name):
        if name not in bundles:
            config, path = VARIANTS[name].config, folder_of(name)
            role = RoleSpec(name="student", path=path, trainable=False)
            bundle = PLUGIN.load([role], config, device=CPU)
            bundles[name] = PLUGIN.adapter(bundle, config, source=path), bundle
        return bundles[name]

    return make


def picture(variant, seed=4):
    """Smooth 8-bit pixels [3, H, W] in [0, 1]."""
    small = normal(1, 3, 4, 6, seed=seed).sigmoid()
    size = (variant.config.height, variant.config.width)
    image = torch.nn.functional.interpolate(small, size=size, mode="bilinear")
    return (image[0] * 255).round() / 255


def pil(image):
    return Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())


def condition(name, adapter, batch=2, seed=1, image=True):
    """Random text and, of a variant that reads one, a random picture."""
    variant = VARIANTS[name]
    cond = Condition({"text": normal(batch, variant.config.max_sequence_length, 16, seed=seed)})
    if image and variant.image:
        first, last = (
            torch.stack([picture(variant, seed=10 * seed + i + end) for i in range(batch)])
            for end in (0, 5)
        )
        cond = adapter.with_image(cond, first, last=last if variant.pair else None)
    return cond


# -- against the stock pipelines ------------------------------------------------------------------

SPECS = {
    "stochastic": SamplerSpec(steps=4, shift=5.0, stochastic=True),
    "guided": SamplerSpec(steps=6, shift=3.0, guidance=3.0),
    "two-guidances": SamplerSpec(steps=5, shift=3.0, guidance=4.0, guidance_2=2.5),
    "unipc": SamplerSpec(steps=6, shift=3.0, guidance=4.0, guidance_2=2.5, solver="unipc"),
}


def clips(name, loaded, folder, record, images, use_image=True, last=None):
    """(ours, theirs) of the same noise, of the pipeline that ``model_index.json`` names."""
    import diffusers

    variant = VARIANTS[name]
    adapter, _ = loaded(name)
    spec = SamplerSpec(**record["sampler"])
    shape = adapter.latent_shape
    noise = normal(len(PROMPTS), *shape, seed=7)
    index = json.loads((folder / "model_index.json").read_text())
    kind = index["_class_name"] if not use_image else "WanImageToVideoPipeline"
    kind = kind if variant.image else "WanPipeline"
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": pil(images)} if use_image and variant.image else {}
    given |= {} if last is None else {"last_image": pil(last)}
    if spec.stochastic:  # its scheduler takes a generator a row too, but nobody hands them on
        fresh = [torch.Generator().manual_seed(100 + n) for n in range(len(PROMPTS))]
        pipe.scheduler.step = partial(pipe.scheduler.step, generator=fresh)
    theirs = pipe(
        prompt=PROMPTS, negative_prompt="left", latents=noise, output_type="pt", **given,
        **record["call"],
    ).frames.permute(0, 2, 1, 3, 4)  # fmt: skip
    cond = adapter.encode_condition(PROMPTS)
    if given:
        first, end = (
            None if one is None else torch.stack([one] * len(PROMPTS)) for one in (images, last)
        )
        cond = adapter.with_image(cond, first, last=end)
    latents = adapter.sample(
        "student", spec, noise, cond,
        neg_cond=adapter.encode_neg_condition("left"),
        generators=RowGenerators(
            [torch.Generator().manual_seed(100 + n) for n in range(len(PROMPTS))]
        ),
    )  # fmt: skip
    return adapter.decode(latents), theirs


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        pytest.param(name, spec, id=f"{name}-{kind}")
        for name, variant in VARIANTS.items()
        for kind, spec in SPECS.items()
        if kind == "stochastic" or (kind in ("two-guidances", "unipc")) == (variant.experts == 2)
    ],
)
def test_the_stock_pipeline_gives_the_same_clip_bit_for_bit(
    name, spec, loaded, folder_of, tmp_path
):
    variant, path = VARIANTS[name], folder_of(name)
    _, bundle = loaded(name)
    role = RoleSpec(name="student", path=path, trainable=False)
    exporter = PLUGIN.exporter(variant.config, source=path)
    weights, request = bundle["student"].weight_sources(), ExportRequest(sampler=spec)
    record = exporter.export(role, weights, tmp_path / "s", request)
    exporter.verify(role, weights, tmp_path / "s", request)
    last = picture(variant, seed=5) if variant.pair else None
    ours, theirs = clips(name, loaded, tmp_path / "s", record, picture(variant), last=last)
    if name == "i2v-experts":  # nothing but the mask states which frames are given
        last = picture(variant, seed=5)
        both, pipes = clips(name, loaded, tmp_path / "s", record, picture(variant), last=last)
        assert torch.equal(both, pipes)
        assert not torch.allclose(both, ours, atol=1e-3)
    assert ours.std() > 1e-3
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)
    assert torch.equal(ours, theirs)
    if variant.expand:
        ours, theirs = clips(name, loaded, tmp_path / "s", record, None, use_image=False)
        assert torch.equal(ours, theirs)


# -- what a transformer is called with, by hand ---------------------------------------------------


@pytest.fixture
def record_calls(loaded):
    """Return ``record_calls(name)``, which yields (module, arguments) of each transformer call."""

    @contextlib.contextmanager
    def watching(name):
        calls, hooks = [], []
        for key, module in loaded(name)[1]["student"].modules.items():

            def note(_, args, given, key=key):
                calls.append((key, given))

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        yield calls
        for hook in hooks:
            hook.remove()

    return watching


SHAPE = (4, 3, 4, 6)


@torch.no_grad()
@EVERY
def test_model_inputs_by_hand(name, loaded, record_calls):
    variant, (adapter, _) = VARIANTS[name], loaded(name)
    cond, x_t = condition(name, adapter), normal(2, *SHAPE, seed=2)
    t = torch.tensor([700.0, 640.5])
    negative = Condition({"text": normal(1, *cond.tensors["text"].shape[1:], seed=9)})
    with record_calls(name) as calls:
        adapter.forward("student", x_t, t, cond, neg_cond=negative, cfg=3.0)
    [(module, given)] = calls  # one call of 2B
    assert module == variant.modules[-1]  # 700 is below the boundary of either model of two
    x = given["hidden_states"].chunk(2)
    assert torch.equal(*x)
    text = torch.cat([cond.tensors["text"], negative.tensors["text"].expand(2, -1, -1)])
    assert torch.equal(given["encoder_hidden_states"], text)
    if variant.channels:
        assert torch.equal(x[0][:, :4], x_t)
        mask = torch.zeros(4, 3)
        mask[:, 0] = 1
        mask[-1, -1] = variant.pair
        assert torch.equal(x[0][:, 4:8], mask[None, ..., None, None].expand(2, -1, -1, 4, 6))
        assert torch.equal(x[0][:, 8:], cond.tensors["image_latents"])
        assert torch.equal(given["timestep"], torch.cat([t, t]))
    elif variant.expand:
        assert torch.equal(x[0][:, :, :1], cond.tensors["image_latents"])
        assert torch.equal(x[0][:, :, 1:], x_t[:, :, 1:])
        # 3 frames of 2 x 3 tokens each.
        by_hand = torch.tensor([[0.0] * 6 + [value] * 12 for value in t.tolist()])
        assert torch.equal(given["timestep"], torch.cat([by_hand, by_hand]))
    else:
        assert torch.equal(x[0], x_t)
    embeds = given["encoder_hidden_states_image"]
    if variant.embeds:  # the picture stays beside the negative text
        own = cond.tensors["image_embeds"]
        assert own.shape == (2, 34 if variant.pair else 17, 20)
        # Two pictures of a row are two rows, which the model puts together again.
        assert torch.equal(embeds, torch.cat([own, own]).view(-1, 17, 20))
    else:
        assert embeds is None


@torch.no_grad()
def test_a_first_frame_is_what_the_condition_says(loaded):
    """TI2V: whatever noise stands there, x0 is the picture and the other frames are the same."""
    adapter, _ = loaded("ti2v")
    cond, t = condition("ti2v", adapter), torch.tensor([700.0, 1000.0])
    x_t, other = normal(2, *SHAPE, seed=2), normal(2, *SHAPE, seed=3)
    other[:, :, 1:] = x_t[:, :, 1:]
    x0, again = (adapter.forward("student", x, t, cond, fwd_pred_type="x0") for x in (x_t, other))
    assert torch.equal(x0, again)
    assert torch.equal(x0[:, :, :1], cond.tensors["image_latents"])
    trained = adapter.trained_frames(cond)
    assert trained.flatten().tolist() == [0, 1, 1]
    assert trained.shape == (1, 1, 3, 1, 1)
    alone = Condition({"text": cond.tensors["text"]})
    assert adapter.trained_frames(alone) is None
    free = adapter.forward("student", x_t, t, alone, fwd_pred_type="x0")
    assert not torch.allclose(free[:, :, :1], x0[:, :, :1], atol=1e-2)


@torch.no_grad()
def test_one_time_for_all_tokens_is_one_time_a_token(loaded, record_calls):
    """TI2V without a picture: the cheap call of training and the stock one of sampling."""
    adapter, bundle = loaded("ti2v")
    cond, x_t = condition("ti2v", adapter, image=False), normal(2, *SHAPE)
    t = torch.tensor([700.0, 333.3])
    v = adapter.forward("student", x_t, t, cond)
    with record_calls("ti2v") as calls:
        adapter.sample("student", SamplerSpec(steps=1), x_t, cond)
    assert calls[0][1]["timestep"].shape == (2, 18)
    (each,) = bundle["student"].modules["transformer"](
        x_t, timestep=t[:, None].expand(-1, 18), encoder_hidden_states=cond.tensors["text"],
        return_dict=False,
    )  # fmt: skip
    assert torch.allclose(v, each, atol=1e-5)


@torch.no_grad()
def test_a_clip_goes_on_from_several_frames(loaded, record_calls):
    """TI2V: the latents of five pixel frames are two frames of the clip, at t = 0."""
    adapter, _ = loaded("ti2v")
    video = torch.stack([picture(VARIANTS["ti2v"], seed=n) for n in range(9)], dim=1)[None]
    text = condition("ti2v", adapter, batch=1, image=False)
    cond = adapter.with_image(text, video[:, :, :5])
    whole = adapter.normalize_latents(adapter.encode(video))
    assert torch.allclose(cond.tensors["image_latents"], whole[:, :, :2], atol=1e-5)
    assert adapter.trained_frames(cond).flatten().tolist() == [0, 0, 1]
    x_t, t = normal(1, *SHAPE), torch.tensor([700.0])
    with record_calls("ti2v") as calls:
        x0 = adapter.forward("student", x_t, t, cond, fwd_pred_type="x0")
    [(_, given)] = calls
    assert torch.equal(given["hidden_states"][:, :, :2], cond.tensors["image_latents"])
    assert torch.equal(given["hidden_states"][:, :, 2:], x_t[:, :, 2:])
    assert given["timestep"].tolist() == [[0.0] * 12 + [700.0] * 6]
    assert torch.equal(x0[:, :, :2], cond.tensors["image_latents"])
    clip = adapter.sample("student", SamplerSpec(steps=2), x_t, cond)
    assert torch.equal(clip[:, :, :2], cond.tensors["image_latents"])
    with pytest.raises(ConditioningError, match="leaves nothing"):
        adapter.with_image(text, video)
    with pytest.raises(ConditioningError, match=r"4k \+ 1"):
        adapter.with_image(text, video[:, :, :4])


@torch.no_grad()
@EVERY
def test_pictures_are_read(name, loaded):
    """Another picture gives another clip, where one is read at all."""
    variant, (adapter, _) = VARIANTS[name], loaded(name)
    x_t, t = normal(1, *SHAPE), torch.tensor([700.0])
    one = condition(name, adapter, batch=1, seed=1)
    two = condition(name, adapter, batch=1, seed=2)
    results = []
    for key in [k for k in one.tensors if k not in ("text", "image_mask")]:
        changed = Condition({**one.tensors, key: two.tensors[key]})
        v, w = (adapter.forward("student", x_t, t, cond) for cond in (one, changed))
        assert not torch.allclose(v, w, atol=1e-4), key
        results.append(key)
    names = ["image_latents"] * variant.image + ["image_embeds"] * variant.embeds
    assert sorted(results) == sorted(names)


# -- invariant 10: one expert a call --------------------------------------------------------------


times = st.floats(0, 1000, width=32)
ratios = st.floats(0.01, 0.99)


@given(t=times, ratio=ratios)
def test_exactly_one_expert_for_each_time_and_equality_goes_high(t, ratio):
    both = ("transformer", "transformer_2")
    boundary = boundary_of(both, None, ratio)
    role = Experts(role="student", modules=both, boundary=boundary)
    expert = role.module_at(torch.tensor([t]))
    assert expert == both[t < boundary]  # in Python's own numbers
    inside = [
        name
        for name, (low, high) in module_ranges(boundary).items()
        if low <= t < high or t == high == 1000
    ]
    assert inside == [expert]
    edge = torch.tensor([boundary])
    assert role.module_at(edge) == "transformer"
    assert role.module_at(torch.nextafter(edge, torch.zeros(1))) == both[1]
    with pytest.raises(ContractError, match="both sides"):
        role.module_at(torch.tensor([boundary, boundary - 1.0]))
    one = Experts(role="s", modules=both[:1], boundary=boundary_of(both[:1], ratio, None))
    assert one.module_at(torch.tensor([t])) == both[0]


@given(boundaries=st.lists(st.floats(1, 999), max_size=3), t=times)
def test_ranges_fill_the_line(boundaries, t):
    time_ranges = ranges(boundaries)
    assert time_ranges[0][0] == 0
    assert time_ranges[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(time_ranges))
    assert len(time_ranges) == len(set(boundaries)) + 1
    assert sum(low <= t < high or t == high == 1000 for low, high in time_ranges) == 1


@torch.no_grad()
def test_a_call_is_that_of_its_expert(loaded):
    """Each side of the boundary, and the boundary itself, is the module called by hand."""
    adapter, bundle = loaded("t2v-experts")
    cond, x_t = condition("t2v-experts", adapter, batch=1), normal(1, *SHAPE)
    below = float(torch.nextafter(torch.tensor(875.0), torch.tensor(0.0)))
    for t, name in [(1000.0, 0), (875.0, 0), (below, 1), (3.0, 1)]:
        module = bundle["student"].modules[("transformer", "transformer_2")[name]]
        (by_hand,) = module(
            x_t, timestep=torch.tensor([t]), encoder_hidden_states=cond.tensors["text"],
            return_dict=False,
        )  # fmt: skip
        assert torch.equal(adapter.forward("student", x_t, torch.tensor([t]), cond), by_hand)
        spec = SamplerSpec(steps=1, guidance=4.0, guidance_2=3.0)
        w = adapter.sampler_guidance(bundle["student"], spec, torch.tensor([t]))
        assert w == (4.0, 3.0)[name]
    with pytest.raises(ContractError, match=r"from 800 to 900, on both sides of 875"):
        adapter.forward("student", normal(2, *SHAPE), torch.tensor([900.0, 800.0]), cond)
    assert adapter.expert_ranges("student") == ((0, 875), (875, 1000))


def test_the_runs_own_boundary(folder_of):
    path = folder_of("t2v-experts")
    config = attrs.evolve(VARIANTS["t2v-experts"].config, boundary_ratio=0.5)
    role = RoleSpec(name="student", path=path, trainable=False)
    adapter = PLUGIN.adapter(PLUGIN.load([role], config, device=CPU), config, source=path)
    assert adapter.expert_of("student", torch.tensor([500.0, 870.0])) == "transformer"
    assert PLUGIN.expert_ranges(role, config)["transformer_2"] == (0, 500)


def test_the_runs_own_boundary_is_exported(folder_of, loaded, tmp_path):
    path, (_, bundle) = folder_of("t2v-experts"), loaded("t2v-experts")
    config = attrs.evolve(VARIANTS["t2v-experts"].config, boundary_ratio=0.5)
    role = RoleSpec(name="student", path=path, trainable=False)
    request = ExportRequest(sampler=SamplerSpec(steps=4, guidance=4.0, guidance_2=3.0))
    weights = bundle["student"].weight_sources()
    record = PLUGIN.exporter(config, source=path).export(role, weights, tmp_path / "s", request)
    assert json.loads((tmp_path / "s/model_index.json").read_text())["boundary_ratio"] == 0.5
    assert (record["call"]["guidance_scale"], record["call"]["guidance_scale_2"]) == (4.0, 3.0)


def test_a_second_guidance_needs_a_second_expert(folder_of, loaded):
    adapter, _ = loaded("t2v")
    cond = condition("t2v", adapter)
    spec = SamplerSpec(steps=2, guidance=3.0, guidance_2=2.0)
    with pytest.raises(ContractError, match="guidance_2"):
        adapter.sample("student", spec, normal(2, *SHAPE), cond, neg_cond=cond[:1])
    role = RoleSpec(name="student", path=folder_of("t2v"), trainable=False)
    problems = PLUGIN.export_problems(role, ExportRequest(sampler=spec))
    messages = {".".join(p.path): p.message for p in problems}
    assert "guidance_2" in messages["sampler"]
    two = attrs.evolve(role, path=folder_of("t2v-experts"))
    assert not list(PLUGIN.export_problems(two, ExportRequest(sampler=spec)))


# -- loading --------------------------------------------------------------------------------------


def moved(source, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in source.read(source.describe()).items()
    }


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)], ids=["whole", "lora"])
def test_both_experts_are_loaded_each_with_its_own(folder_of, lora):
    variant, path = VARIANTS["t2v-experts"], folder_of("t2v-experts")
    role = RoleSpec(name="student", path=path, trainable=True, lora=lora)
    bundle = PLUGIN.load([role], variant.config, device=CPU)
    modules = bundle["student"].modules
    assert tuple(modules) == variant.modules
    for key, source in PLUGIN.weights(path).items():
        state = {base_name(n): value for n, value in modules[key].state_dict().items()}
        for name, value in source.read(source.describe()).items():
            assert torch.equal(state[name], value)
    if lora is not None:
        assert set(bundle["student"].trained) == set(variant.modules)
        a, b = (dict(modules[k].named_parameters()) for k in variant.modules)
        first = next(n for n in bundle["student"].trained["transformer"] if "lora_A" in n)
        assert not torch.equal(a[first], b[first])  # drawn under the module's own name
    plan = PLUGIN.plan(role, variant.config)
    assert [m.name for m in plan.modules] == list(variant.modules)
    counts = [sum(p.numel() for p in m.parameters()) for m in modules.values()]
    assert [m.parameters + m.adapters for m in plan.modules] == counts
    assert plan.present


def test_a_warm_start_goes_by_module(folder_of):
    variant, path = VARIANTS["t2v-experts"], folder_of("t2v-experts")
    role = RoleSpec(name="student", path=path, trainable=True)
    sources = PLUGIN.weights(path)
    given = {
        key: TensorWeights(key, moved(source, seed))
        for seed, (key, source) in enumerate(sources.items())
    }
    bundle = PLUGIN.load([role], variant.config, device=CPU, weights={"student": given})
    for key, source in given.items():
        state = bundle["student"].modules[key].state_dict()
        assert all(torch.equal(state[name], value) for name, value in source.tensors.items())
    half = {"student": {"transformer": given["transformer"]}}
    with pytest.raises(WeightsError, match="modules are transformer, transformer_2"):
        PLUGIN.load([role], variant.config, device=CPU, weights=half)


# -- what is refused ------------------------------------------------------------------------------


def test_conditions_that_do_not_fit_are_refused(loaded):
    x_t, t = normal(1, *SHAPE), torch.tensor([700.0])

    def message(name, cond):
        with pytest.raises(ConditioningError) as error:
            loaded(name)[0].forward("student", x_t, t, cond)
        return str(error.value)

    image = condition("i2v-2.1", loaded("i2v-2.1")[0], batch=1)
    text = Condition({"text": image.tensors["text"]})
    assert "'image_latents'" in message("i2v-2.1", text)
    short = Condition({**image.tensors, "image_latents": image.tensors["image_latents"][:, :, :1]})
    assert "must be [B, 4, 3, 4, 6]" in message("i2v-2.1", short)
    bare = Condition({k: v for k, v in image.tensors.items() if k != "image_embeds"})
    assert "image_embeds are missing" in message("i2v-2.1", bare)
    narrow = Condition({**image.tensors, "image_embeds": image.tensors["image_embeds"][..., :3]})
    assert "[B, tokens, 20]" in message("i2v-2.1", narrow)
    plain = condition("t2v", loaded("t2v")[0], batch=1)
    pictured = image.tensors["image_latents"]
    assert "text alone" in message("t2v", Condition({**plain.tensors, "image_latents": pictured}))
    first = condition("ti2v", loaded("ti2v")[0], batch=1)
    assert "must be [B, 4, K, 4, 6] with K from 1 to 2" in message(
        "ti2v", Condition({**first.tensors, "image_latents": pictured})
    )
    pair = condition("flf2v", loaded("flf2v")[0], batch=1)
    one = Condition({**pair.tensors, "image_embeds": pair.tensors["image_embeds"][:, :17]})
    assert "[B, 34, 20]" in message("flf2v", one)


def test_pictures_that_do_not_fit_are_refused(loaded):
    cond = condition("t2v", loaded("t2v")[0], batch=1)
    with pytest.raises(ConditioningError, match="text alone"):
        loaded("t2v")[0].with_image(cond, torch.zeros(1, 3, 32, 48))
    first = torch.zeros(1, 3, 32, 48)
    with pytest.raises(ConditioningError, match="reads first ones alone"):
        loaded("i2v-2.1")[0].with_image(cond, first, last=first)
    with pytest.raises(ConditioningError, match="5 first frames are given, and the model reads"):
        loaded("i2v-2.1")[0].with_image(cond, torch.zeros(1, 3, 5, 32, 48))
    with pytest.raises(ConditioningError, match=r"must be \[1, 3, 32, 48\]"):
        loaded("flf2v")[0].with_image(cond, first, last=first[..., :32])
    for shape in ((1, 3, 48, 32), (2, 3, 32, 48), (3, 32, 48)):
        with pytest.raises(ConditioningError, match=r"must be \[1, 3, 32, 48\]"):
            loaded("ti2v")[0].with_image(cond, torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "module", "change", "reason"),
    [
        ("t2v-experts", "index", {"boundary_ratio": None}, "boundary_ratio"),
        ("t2v", "index", {"boundary_ratio": 0.9}, "single transformer"),
        ("t2v-experts", "transformer_2", {"eps": 1e-5}, "two architectures"),
        ("t2v", "transformer", {"in_channels": 9}, "neither a text-to-video"),
        ("i2v-2.1", "index", {"expand_timesteps": True}, "one of the two"),
        ("t2v", "transformer", {"image_dim": 20}, "no latents of it"),
        ("t2v", "transformer", {"pos_embed_seq_len": 514}, "first and a last frame"),
        ("i2v-2.1", "transformer", {"pos_embed_seq_len": 33}, "as many of each"),
        ("t2v", "index", {"transformer": [None, None]}, "names no transformer"),
    ],
)
def test_models_that_would_be_called_wrongly_are_refused(
    name, module, change, reason, pipeline_template, tmp_path
):
    folder = build(name, pipeline_template, tmp_path / "p")
    file = folder / ("model_index.json" if module == "index" else f"{module}/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    role, config = RoleSpec(name="r", path=str(folder), trainable=False), VARIANTS[name].config
    assert reason in "\n".join(p.message for p in PLUGIN.role_problems(role, config))
    with pytest.raises(WeightsError, match=reason):
        PLUGIN.load([role], config, device=CPU)


def test_the_run_file_may_set_a_boundary_that_the_index_lacks(pipeline_template, tmp_path):
    folder = build("t2v-experts", pipeline_template, tmp_path / "p")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    role = RoleSpec(name="r", path=str(folder), trainable=False)
    config = attrs.evolve(VARIANTS["t2v-experts"].config, boundary_ratio=0.7)
    assert not list(PLUGIN.role_problems(role, config))
    PLUGIN.load([role], config, device=CPU)


def test_a_picture_takes_512_tokens_of_text(folder_of):
    role = RoleSpec(name="r", path=folder_of("i2v-2.1"), trainable=False)
    config = attrs.evolve(VARIANTS["i2v-2.1"].config, max_sequence_length=6)
    assert "must be 512" in "\n".join(p.message for p in PLUGIN.role_problems(role, config))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 875.0, float("nan")])
def test_boundaries_lie_between_zero_and_one(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        WanPipelineConfig(num_frames=9, height=32, width=32, boundary_ratio=ratio)


def test_roles_that_read_different_conditions_are_refused(folder_of, loaded):
    roles = {
        "teacher": loaded("i2v-2.1")[1]["student"],
        "student": loaded("t2v")[1]["student"],
    }
    with pytest.raises(WeightsError, match="teacher reads text, a first frame's latents and its"):
        PLUGIN.adapter(ModelBundle(roles), VARIANTS["i2v-2.1"].config, source=folder_of("i2v-2.1"))


def test_a_broken_image_encoder_is_a_problem(pipeline_template, tmp_path):
    folder = build("i2v-2.1", pipeline_template, tmp_path / "p")
    role = RoleSpec(name="r", path=str(folder), trainable=False)
    config = VARIANTS["i2v-2.1"].config
    assert not list(PLUGIN.role_problems(role, config))
    assert PLUGIN.condition_shapes(config, source=str(folder)) == {
        "text": (512, 16),
        "image_latents": (4, 3, 4, 6),
        "image_embeds": (17, 20),
    }
    (folder / "image_processor/preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in "\n".join(
        p.message for p in PLUGIN.role_problems(role, config)
    )
    adapter = PLUGIN.adapter(PLUGIN.load([role], config, device=CPU), config, source=str(folder))
    with pytest.raises(WeightsError, match="cannot encode a picture"):
        condition("i2v-2.1", adapter, batch=1)


def test_a_boundary_that_fp32_does_not_hold_is_the_same_in_both_precisions():
    """A level of the sampler is a double, the t of its call fp32: both are on one side."""
    ratio = 0.8751
    boundary = boundary_of(("transformer", "transformer_2"), ratio, None)
    assert boundary == float(torch.tensor(875.1, dtype=torch.float32)) != 875.1
    (low, high), level = ranges([boundary]), float(torch.tensor(875.1))
    assert low[1] == high[0] <= level
    assert level in (low[1], high[0])
