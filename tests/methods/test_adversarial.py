"""The GAN: its maths, who learns from it, and what it does to distribution matching."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import DMD2Config, DMD2Method, GanConfig, LaddConfig, LaddMethod, TimeSampling
from distill_methods.adversarial.adversary import Adversary
from distill_methods.adversarial.config import FDivergence
from distill_methods.adversarial.losses import (
    accuracy,
    approximate_r1,
    attach_gradient,
    density_ratio,
    discriminator_loss,
    divergence_weight,
    generator_loss,
)
from distill_methods.context import MethodContext
from distill_methods.maths import dmd_gradient
from distill_methods.noise_sampler import NoisedLatents, NoiseSampler
from distill_protocols import CapabilityError, RandomStreams, RoleError, SamplerSpec
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_roles import gradients, rows, toy_bundle

DEFAULTS: dict[str, Any] = {}
ONE_STEP = SamplerSpec(steps=1, stochastic=True)
SEEDS = {"student": 1, "teacher": 2, "critic": 3, "discriminator": 4}


def dmd2(
    *,
    on: str = "teacher",
    able: Any = CAPABILITIES,
    adapter: Any = ToyAdapter,
    gan: dict[str, Any] | None = DEFAULTS,
    **options: Any,
) -> DMD2Method:
    seeds = {n: seed for n, seed in SEEDS.items() if gan is not None or n != "discriminator"}
    bundle = toy_bundle(heads_on=on, **seeds)
    config = DMD2Config(
        **{
            "student_sampler": ONE_STEP,
            "generator_update_interval": 2,
            "gan": None if gan is None else GanConfig(**gan),
        }
        | options
    )
    return DMD2Method(
        bundle,
        adapter(bundle, capabilities=able),
        config,
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


def ladd(*, on: str = "teacher", **options: Any) -> LaddMethod:
    bundle = toy_bundle(heads_on=on, student=1, teacher=2, discriminator=4)
    return LaddMethod(
        bundle,
        ToyAdapter(bundle),
        LaddConfig(**{"student_sampler": ONE_STEP} | options),
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


# -- maths ------------------------------------------------------------------------------------

logits = st.lists(st.lists(st.floats(-80, 80), min_size=2, max_size=2), min_size=1, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def log1p_exp(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x.double()))


@given(logits, logits)
def test_losses_are_those_of_goodfellow(fake: Tensor, real: Tensor):
    torch.testing.assert_close(generator_loss(fake), log1p_exp(-fake).mean())
    expected = log1p_exp(fake).mean() + log1p_exp(-real).mean()
    torch.testing.assert_close(discriminator_loss(fake, real), expected)
    right = [value < 0 for value in fake.flatten()] + [value > 0 for value in real.flatten()]
    assert accuracy(fake, real).item() == pytest.approx(sum(right) / len(right))


def test_r1_of_a_linear_discriminator_is_the_square_of_its_slope():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(6, generator=generator, dtype=torch.float64)
    x, n = torch.randn(2, 40_000, 6, generator=generator, dtype=torch.float64)
    real, moved = (x @ slope)[:, None], ((x + 0.1 * n) @ slope)[:, None]
    expected = 0.1**2 * slope.square().sum()
    torch.testing.assert_close(approximate_r1(real, moved), expected, rtol=0.03, atol=0)


F: dict[FDivergence, Any] = {
    "reverse_kl": lambda r: -torch.log(r),
    "forward_kl": lambda r: r * torch.log(r),
    "js": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
    "softened_reverse_kl": lambda r: (r + 1) * torch.log(0.5 + 0.5 / r),
    "squared_hellinger": lambda r: 1 - torch.sqrt(r),
    "jeffreys": lambda r: (r - 1) * torch.log(r),
    "neyman": lambda r: (1 - r).square() / r,
}
"""D_f(p || q) = E_q f(p / q)."""


@pytest.mark.parametrize("name", F)
def test_weights_are_r_squared_times_the_second_derivative(name: FDivergence):
    r = torch.tensor([0.1, 0.5, 1.0, 1.7, 6.0, 20.0], dtype=torch.float64)
    step = 1e-4 * r
    second = (F[name](r + step) - 2 * F[name](r) + F[name](r - step)) / step.square()
    h = r.square() * second
    torch.testing.assert_close(divergence_weight(name, r), h / h[2], rtol=1e-5, atol=0)


def test_the_ratio_of_two_gaussians_is_read_off_an_optimal_discriminator():
    data, student = torch.distributions.Normal(1.0, 1.0), torch.distributions.Normal(0.0, 1.0)
    x = torch.linspace(-2, 3, 11)
    p, q = data.log_prob(x).exp(), student.log_prob(x).exp()
    optimal = torch.logit(p / (p + q))[:, None].expand(-1, 3)
    torch.testing.assert_close(density_ratio(optimal, (1e-6, 1e6)), p / q, rtol=1e-4, atol=0)
    low = density_ratio(optimal, (0.5, 2.0))
    assert low.min() == 0.5
    assert low.max() == 2.0


def test_a_gradient_that_is_given_and_a_value_that_is():
    x = torch.randn(2, 3, requires_grad=True)
    gradient = torch.randn(2, 3)
    loss = attach_gradient(torch.tensor(0.7), x, gradient)
    assert loss.item() == pytest.approx(0.7)
    loss.backward()
    assert torch.equal(x.grad, gradient)


# -- who learns -------------------------------------------------------------------------------


def test_the_gan_leaves_the_critic_alone_unless_it_trains_features():
    def critic(**options: Any) -> list[Tensor]:
        method = dmd2(**options)
        method.single_train_step(toy_batch(2), 1).loss_map["total_loss"].backward()
        return gradients(method.bundle)["critic"]

    alone = critic(gan=None, on="critic")
    assert all(map(torch.equal, critic(on="critic", gan={"discriminator_weight": 9.0}), alone))
    trained = critic(on="critic", gan={"train_features": True})
    assert not any(map(torch.equal, trained[:2], alone[:2]))


def test_the_students_turn_by_hand():
    """x_t is that of the scores; the student's gradient is DMD's and the weighted GAN's."""
    method = dmd2(gan={"generator_weight": 0.5}, rollout="data")
    batch = toy_batch(3)
    result = method.single_train_step(batch, 2)
    result.loss_map["total_loss"].backward()
    actual = gradients(method.bundle)["student"]

    plain = dmd2(gan={"generator_weight": 0.0}, rollout="data")
    plain.single_train_step(batch, 2).loss_map["total_loss"].backward()
    of_dmd = gradients(plain.bundle)["student"]

    streams = RandomStreams(0)
    nets = {n: next(iter(r.modules.values())) for n, r in method.bundle.roles.items()}
    text, over = batch.cond.tensors["text"], lambda value: value.view(-1, 1, 1, 1, 1)
    eps = streams.rows("dmd2.student.data_noise", 3).normal(LATENT_SHAPE)
    nets["student"].zero_grad()
    x = eps - nets["student"](eps, torch.full((3,), 1000.0), text)
    u = streams.rows("dmd2.student.t", 3).uniform()
    t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    noise = streams.rows("dmd2.student.noise", 3).normal(LATENT_SHAPE)
    x_t = (1 - over(t / 1000)) * x + over(t / 1000) * noise
    logits_fake = nets["discriminator"]([nets["teacher"].features(x_t, t, text)])
    loss = torch.log1p(torch.exp(-logits_fake)).mean()
    torch.testing.assert_close(result.loss_map["gan_generator_loss"], loss.detach())
    loss.backward()
    for ours, dmd, parameter in zip(actual, of_dmd, nets["student"].parameters(), strict=True):
        torch.testing.assert_close(ours, dmd + 0.5 * parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_discriminators_turn_by_hand():
    method = dmd2(gan={"r1_weight": 3.0, "r1_sigma": 0.2, "discriminator_weight": 0.5})
    batch = toy_batch(2)
    result = method.single_train_step(batch, 1)
    result.loss_map["total_loss"].backward()
    actual = gradients(method.bundle)["discriminator"]

    streams = RandomStreams(0)
    nets = {n: next(iter(r.modules.values())) for n, r in method.bundle.roles.items()}
    text = batch.cond.tensors["text"]
    x = streams.rows("dmd2.critic.rollout", 2).normal(LATENT_SHAPE)
    fake = (x - nets["student"](x, torch.full((2,), 1000.0), text)).detach()
    real = (batch.latents - 0.5) / 2.0
    u = streams.rows("dmd2.gan.t", 2).uniform()
    t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    s, noise = (t / 1000).view(-1, 1, 1, 1, 1), streams.rows("dmd2.gan.noise", 2)
    noise = noise.normal(LATENT_SHAPE)
    push = streams.rows("dmd2.gan.r1", 2).normal(LATENT_SHAPE)
    real_t = (1 - s) * real + s * noise
    nets["discriminator"].zero_grad()
    of = lambda x_t: nets["discriminator"]([nets["teacher"].features(x_t, t, text).detach()])  # noqa: E731
    of_fake, of_real = of((1 - s) * fake + s * noise), of(real_t)
    loss = torch.log1p(of_fake.exp()).mean() + torch.log1p((-of_real).exp()).mean()
    r1 = (of_real - of(real_t + 0.2 * push)).square().mean()
    torch.testing.assert_close(result.loss_map["gan_discriminator_loss"], loss)
    torch.testing.assert_close(result.loss_map["gan_r1"], r1)
    (0.5 * (loss + 3.0 * r1)).backward()
    for ours, parameter in zip(actual, nets["discriminator"].parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-7)
    right = torch.cat([of_fake < 0, of_real > 0]).float().mean()
    assert result.outputs["gan_accuracy"] == right
    torch.testing.assert_close(result.outputs["gan_real_logit"], of_real.mean().detach())


def test_frames_that_stay_out_of_the_loss_get_no_derivative():
    bundle = toy_bundle(heads_on="teacher", **SEEDS)
    adapter = ToyAdapter(bundle)
    noise = NoiseSampler(adapter, RandomStreams(0))
    context = MethodContext(
        name="x",
        bundle=bundle,
        adapter=adapter,
        noise=noise,
        negative=None,
        device=torch.device("cpu"),
        poll=lambda: None,
    )
    adversary = Adversary(context, GanConfig(), allowed_on=("teacher",))
    batch, loss_mask = toy_batch(2), torch.ones(1, 1, LATENT_SHAPE[1], 1, 1)
    loss_mask[:, :, 0] = 0
    gradient_of = []
    for mask in (None, loss_mask):
        x = batch.latents.clone().requires_grad_()
        noised = noise.add_noise_at_random_time(x.detach(), "x.t", 1, TimeSampling(t_max=500))
        noise.streams.load_state_dict(RandomStreams(0).state_dict())
        adversary.generator_loss(x, noised, batch.cond, loss_mask=mask).loss.backward()
        gradient_of.append(x.grad)
    assert gradient_of[0][:, :, 0].abs().max() > 0
    assert torch.equal(gradient_of[1], gradient_of[0] * loss_mask)


def test_the_gan_may_have_a_t_of_its_own():
    method = dmd2(gan={"time": TimeSampling(t_min=400, t_max=410)})
    for iteration, calls in ((1, 2), (2, 1)):
        method.adapter.calls.clear()
        method.single_train_step(toy_batch(4), iteration)
        seen = [c for c in method.adapter.calls if c.role == "teacher" and c.cfg is None]
        assert len(seen) == calls
        assert all(400 <= t <= 410 for c in seen for t in c.t)


def test_a_student_trained_by_the_gan_alone_matches_the_data():
    """Data of one mean; a discriminator on the teacher's random features must lead there."""
    method = ladd(r1_weight=30.0, r1_sigma=0.3, time=TimeSampling(t_max=600))
    for key, lr in (("student.transformer", 3e-3), ("discriminator.heads", 1e-2)):
        (group,) = method.optimizer_dict[key].param_groups
        group["betas"] = (0.0, 0.99)  # with momentum the two chase each other in circles
        method.scheduler_dict[key].base_lrs = [lr]
    means = []
    for iteration in range(1, 501):
        batch = toy_batch(16, seed=iteration)
        batch = attrs.evolve(batch, latents=0.4 * batch.latents + 3.5)  # normalised: N(1.5, 0.2)
        result = method.single_train_step(batch, iteration)
        result.loss_map["total_loss"].backward()
        method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        means.append(float(result.outputs["student_mean"]))
    assert abs(means[0] - 1.5) > 1
    assert sum(means[-200:]) / 200 == pytest.approx(1.5, abs=0.2)


# -- f-divergences ----------------------------------------------------------------------------


def captured_weight(method: DMD2Method, batch: Any) -> tuple[Tensor, Tensor]:
    """dL_dmd/dx of the student's turn, and the logits that it saw, by hand."""
    result = method.single_train_step(batch, 2)
    x0 = result.outputs["student_x0"]
    g = dmd_gradient(x0, result.outputs["critic_x0"], result.outputs["teacher_x0"])
    return result.loss_map["dmd_loss"], g


class Listening(ToyAdapter):
    """Keeps the logits."""

    heard: list[Tensor]

    def discriminate(self, role: str, features: Any) -> Tensor:
        self.heard.append(super().discriminate(role, features))
        return self.heard[-1]


@pytest.mark.parametrize("name", F)
def test_each_samples_gradient_is_weighted_by_its_own_ratio(name: FDivergence):
    batch = toy_batch(3)
    method = dmd2(f_divergence=name, rollout="data", adapter=Listening)
    method.adapter.heard = []
    loss, g = captured_weight(method, batch)
    ratio = method.adapter.heard[0].detach().mean(dim=1).exp().clamp(0.1, 20)
    h = divergence_weight(name, ratio).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(loss.detach(), 0.5 * (h * g).square().mean())
    if name == "reverse_kl":
        assert torch.equal(loss.detach(), captured_weight(dmd2(rollout="data"), batch)[0].detach())
    else:
        assert h.max() > 1.01 * h.min()


def test_a_samples_weight_does_not_depend_on_its_neighbours():
    method = dmd2(f_divergence="js", rollout="data")
    full, batch = dmd2(f_divergence="js", rollout="data"), toy_batch(4)
    total = full.single_train_step(batch, 2).loss_map["total_loss"]
    parts = [
        method.single_train_step(rows(batch, i, i + 1), 2).loss_map["total_loss"] for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), total)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_divergence": "js"}, "js weights .* Set gan"),
        ({"f_divergence": "js", "gan": GanConfig(time=TimeSampling())}, "Leave gan.time out"),
        ({"f_divergence": "kl"}, "'f_divergence' must be in"),
        ({"f_ratio_limits": (0.5, 2.0)}, "has no effect: the reverse KL"),
        ({"f_divergence": "js", "gan": GanConfig(), "f_ratio_limits": (2.0, 3.0)}, "hold 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DMD2Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator_weight": -1.0}, "must be at least 0"),
        ({"discriminator_weight": 0.0}, "must be above 0"),
        ({"r1_weight": -1.0}, "must be at least 0"),
        ({"r1_sigma": 0.2}, "no effect with r1_weight 0"),
    ],
)
def test_gan_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GanConfig(**options)


def test_a_discriminator_on_the_wrong_role_is_refused():
    with pytest.raises(
        RoleError, match="heads on 'student'; it must be heads on teacher or critic"
    ):
        dmd2(on="student")
    with pytest.raises(RoleError, match="heads on 'teacher'; it must be heads on critic"):
        dmd2(gan={"train_features": True})
    with pytest.raises(RoleError, match="must be heads on teacher"):
        ladd(on="student")


def test_an_adapter_without_features_is_refused():
    with pytest.raises(CapabilityError, match="supports_features"):
        dmd2(able=attrs.evolve(CAPABILITIES, supports_features=False))


@pytest.mark.parametrize("update", ["alternate", "every_step"])
def test_ladds_turns(update: str):
    method = ladd(generator_update_interval=3, discriminator_update=update)
    for iteration in range(1, 7):
        method.single_train_step(toy_batch(2), iteration).loss_map["total_loss"].backward()
        reached = {name for name, grads in gradients(method.bundle).items() if grads}
        student = iteration % 3 == 0
        also = {"discriminator"} if update == "every_step" else set()
        assert reached == ({"student"} | also if student else {"discriminator"})
        method.optimizers_zero_grad(iteration)
    with pytest.raises(ValueError, match="leaves the discriminator no iteration"):
        LaddConfig(generator_update_interval=1)


class _Narrow(ToyAdapter):
    """Its features pass fp16, as those of a role in that precision."""

    def forward(self, role, x_t, t, cond, *, features=None, **options):
        if features is not None:
            for block in features:
                # Small as the derivative of a deep network: below what fp16 holds, divided by
                # the number of a clip's elements.
                features[block] = (x_t.half() * 1e-4).float()
            return x_t
        return super().forward(role, x_t, t, cond, **options)

    def discriminate(self, role, features):
        return torch.stack([f.flatten(1).mean(dim=1) for f in features.values()], dim=1)


def test_the_students_gan_gradient_survives_features_in_16_bits():
    """The derivative of a mean over 2**17 elements times 1e-4 is 8e-10, and fp16 ends at 6e-8."""
    method = dmd2(adapter=_Narrow)
    context: MethodContext = method.context
    adversary = Adversary(context, GanConfig(), allowed_on=("teacher",))
    x = torch.randn(2, 1, 2**16, 1, 1, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    noised = NoisedLatents(x.detach(), torch.zeros_like(x), torch.zeros(2))
    adversary.generator_loss(x, noised, toy_batch(2).cond).loss.backward()
    assert x.grad is not None
    # softplus'(-D) is 1/2 at D = 0, divided by rows and elements.
    expected = torch.full_like(x, -0.5 * 1e-4 / x.numel())
    torch.testing.assert_close(x.grad, expected, rtol=0.01, atol=0)
