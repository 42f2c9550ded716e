"""Options of a discriminator. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import Attribute, field, frozen
from distill_protocols.validators import above, at_least

from distill_methods.time_sampling import TimeSampling

FDivergence = Literal[
    "reverse_kl",
    "forward_kl",
    "js",
    "softened_reverse_kl",
    "squared_hellinger",
    "jeffreys",
    "neyman",
]


def _has_an_effect(config: DiscriminatorOptions, attribute: Attribute[float], value: float) -> None:
    if config.r1_weight == 0 and value != attribute.default:
        raise ValueError(
            f"{value} has no effect with r1_weight 0, which leaves the penalty out. Set r1_weight, "
            "or leave r1_sigma out"
        )


@frozen(kw_only=True)
class DiscriminatorOptions:
    """Options of a discriminator's loss.

    Attributes:
        r1_weight: weight of the approximate R1 penalty ``mean |D(x_t) - D(x_t + sigma n)|^2`` on
            real clips (APT, Lin et al. 2025, arXiv:2501.08316) in the discriminator's loss; 0 is
            none.
        r1_sigma: its sigma: within what distance of a real clip D is kept constant.
    """

    r1_weight: float = field(
        default=0.0, validator=at_least(0, "a negative penalty would reward steep discriminators")
    )
    r1_sigma: float = field(
        default=0.1, validator=[above(0, "at 0 both clips are the same"), _has_an_effect]
    )

    @property
    def discriminator_metrics(self) -> tuple[str, ...]:
        """Names of what the discriminator's turn measures (``MethodConfig.metrics``)."""
        penalty = ("loss/gan_r1",) if self.r1_weight > 0 else ()
        logits = ("gan_accuracy", "gan_fake_logit", "gan_real_logit")
        return ("loss/gan_discriminator_loss", *penalty, *logits)


@frozen(kw_only=True)
class GanConfig(DiscriminatorOptions):
    """A GAN beside distribution matching (DMD2, Yin et al. 2024, section 4.3).

    The role ``discriminator`` is heads on features of the critic or of a frozen teacher
    (``DiscriminatorSpec.on``). It is trained in the critic's turns.

    Attributes:
        generator_weight: weight of ``softplus(-D(fake))`` in the student's loss. 0: the
            discriminator serves ``f_divergence`` alone.
        discriminator_weight: weight of ``softplus(D(fake)) + softplus(-D(real))``. It makes no
            difference to Adam, unless ``train_features`` adds the loss to the critic's.
        time: the t at which clips are noised before D sees them; left out: that of the scores, and
            in the student's turn D then sees the very x_t of the scores.
        train_features: whether D's loss also trains the critic whose features it reads (as DMD2's
            own code does), or its heads alone. Needs heads on the critic.
    """

    generator_weight: float = field(
        default=0.03,
        validator=at_least(
            0, "a negative weight would make the student easier to distinguish from data"
        ),
    )
    discriminator_weight: float = field(
        default=1.0, validator=above(0, "the discriminator would learn nothing")
    )
    time: TimeSampling | None = None
    train_features: bool = False
