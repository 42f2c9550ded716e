"""Rollouts that end where their phase does, and the noise that their clips get."""

from __future__ import annotations

from distill_protocols import Batch, ContractError, Latents, one_tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import expert_ranges_of
from distill_methods.maths import add_phase_noise, phase_velocity
from distill_methods.noise_sampler import NoisedLatents
from distill_methods.phased_dmd.config import TWO_EXPERTS, PhasedDMDConfig, Phases
from distill_methods.rollouts import Rollout, allowed_exit_steps, shared_exit, simulate
from distill_methods.time_sampling import MAX_T, TimeSampling


def find_phases(context: MethodContext, config: PhasedDMDConfig) -> Phases:
    """Return the phases of the roles that the method calls.

    Raises:
        ContractError: one of them has one expert, or the config leaves a phase out.
    """
    for need in config.roles:
        ranges = expert_ranges_of(context.adapter, need.name)
        if len(ranges) != 2 or ranges[0][0] > 0 or ranges[1][1] < MAX_T:
            raise ContractError(f"role {need.name!r} {TWO_EXPERTS}")
    try:
        return config.phases(expert_ranges_of(context.adapter, "student")[1][0])
    except ValueError as error:
        raise ContractError(str(error)) from None


class PhasedRollouts:
    """The student's sampling from noise, left at a step of one expert.

    Left at a step k of the expert for high noise levels, it goes on by one step of the sampler to
    the end of its phase, ``x_b = x_k + (s_b - s_k) v``: there the other expert takes over. A
    stochastic sampler's x_b is ``(1 - s_b) x0 + s_b eps`` with fresh noise, and what is matched
    then is x0 itself: noised further, x_b has the distribution of x0 noised at once.
    """

    def __init__(self, context: MethodContext, config: PhasedDMDConfig, phases: Phases) -> None:
        self._context = context
        self._config = config
        self._phases = phases

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """See ``RolloutFunction``."""
        context, config = self._context, self._config
        purpose = f"{context.name}.{turn}"
        exit_steps = allowed_exit_steps(context, config, purpose, iteration)
        last: list[Latents] = []

        def keep(_step: int, x: Latents) -> None:
            last[:] = [x]

        rollout = simulate(context, config, batch, purpose, exit_steps, on_step=keep)
        t = config.student_levels[shared_exit(rollout)]
        if t < self._phases.boundary or config.student_sampler.stochastic:
            return rollout
        x0, x_t = one_tensor(rollout.x0).detach(), one_tensor(last[0])
        # x_k + (s_b - s_k) v of v = (x_k - x0) / s_k.
        x_end = x0 + (self._phases.t_end / t) * (x_t - x0)
        return rollout._replace(x_end=x_end, t_end=self._phases.t_end)


class PhaseNoising:
    """Noise to a t of the phase that a clip left: by the transition kernel from x_b in the phase of
    high noise levels, ``x_t = a x_b + beta eps``, and from x0 in the other one."""

    def __init__(self, context: MethodContext, config: PhasedDMDConfig, phases: Phases) -> None:
        self._context = context
        self._config = config
        self._phases = phases

    def add_noise(
        self, rollout: Rollout, purpose: str, iteration: int, time: TimeSampling, *roles: str
    ) -> NoisedLatents:
        """See ``ClipNoising.add_noise``."""
        config, sampler, x0 = self._config, self._context.noise, one_tensor(rollout.x0)
        is_high = config.student_levels[shared_exit(rollout)] >= self._phases.boundary
        in_phase = config.phase_time(self._phases, time, is_high=is_high)
        t = sampler.sample_timesteps(f"{purpose}.t", len(x0), iteration, in_phase, *roles)
        t = t.to(x0.device)
        noise = sampler.noise_like(x0, f"{purpose}.noise")
        if rollout.x_end is None:
            x_t = self._context.adapter.add_noise(x0, noise, t)
        else:
            x_t = add_phase_noise(one_tensor(rollout.x_end), noise, t, rollout.t_end)
        return NoisedLatents(x_t, noise, t)

    def velocity(self, rollout: Rollout, noised: NoisedLatents) -> Latents:
        """See ``ClipNoising.velocity``."""
        if rollout.x_end is None:
            return self._context.adapter.target(rollout.x0, noised.noise, noised.t, "v")
        return phase_velocity(
            one_tensor(rollout.x_end), one_tensor(noised.noise), noised.t, rollout.t_end
        )
