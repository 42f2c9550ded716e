"""The suite that the package of a model family runs with pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from distill_conformance.adapter_checks import (
    calls,
    causal,
    conditions,
    latents,
    loading,
    optional,
    sampling,
)
from distill_conformance.failures import NotApplicable

CaseT = TypeVar("CaseT")


def as_test(check: Callable[[CaseT], None]) -> Callable[[object, CaseT], None]:
    """Make a pytest method, with the check's docstring, that takes the fixture ``case``."""

    def test(self: object, case: CaseT) -> None:
        try:
            check(case)
        except NotApplicable as reason:
            pytest.skip(str(reason))

    test.__doc__ = check.__doc__
    test.__name__ = check.__name__.replace("check_", "test_", 1)
    return test


class AdapterSuite:
    """Inherit from it in a class whose name begins with ``Test``, and write a fixture ``case``.

    The fixture returns an ``AdapterCase``. A function of the module with ``scope="module"`` loads
    the models once; a method of the class, which pytest calls for each test, loads them each time.

    A test of a capability that the family does not state is skipped. To take a check out, set it
    to None in the subclass, and say why there.
    """

    # plugin, plan, weights
    test_plugin = as_test(loading.check_plugin)
    test_plan_is_what_loads = as_test(loading.check_plan_is_what_loads)
    test_loading_is_deterministic = as_test(loading.check_loading_is_deterministic)
    test_weights_round_trip = as_test(loading.check_weights_round_trip)
    test_incomplete_weights = as_test(loading.check_incomplete_weights)
    test_path_weights = as_test(loading.check_path_weights)
    test_unknown_path = as_test(loading.check_unknown_path)
    test_activation_checkpointing = as_test(loading.check_activation_checkpointing)
    test_offload = as_test(loading.check_offload)
    test_lora = as_test(loading.check_lora)
    test_lora_beside_base = as_test(loading.check_lora_beside_base)
    test_exports = as_test(loading.check_exports)

    # model calls
    test_outputs = as_test(calls.check_outputs)
    test_inputs_are_kept = as_test(calls.check_inputs_are_kept)
    test_model_reads_its_inputs = as_test(calls.check_model_reads_its_inputs)
    test_batch_invariance = as_test(calls.check_batch_invariance)
    test_guidance = as_test(calls.check_guidance)
    test_guidance_needs_a_negative = as_test(calls.check_guidance_needs_a_negative)
    test_gradients = as_test(calls.check_gradients)
    test_no_gradient_modes = as_test(calls.check_no_gradient_modes)
    test_prediction_types = as_test(calls.check_prediction_types)
    test_sixteen_bits = as_test(calls.check_sixteen_bits)
    test_wrong_inputs = as_test(calls.check_wrong_inputs)
    test_global_random_state = as_test(calls.check_global_random_state)

    # noise, latents, pixels
    test_noise_ends = as_test(latents.check_noise_ends)
    test_conversions = as_test(latents.check_conversions)
    test_normalization = as_test(latents.check_normalization)
    test_layout = as_test(latents.check_layout)
    test_latent_shape = as_test(latents.check_latent_shape)
    test_codec = as_test(latents.check_codec)

    # conditions
    test_condition_shapes = as_test(conditions.check_condition_shapes)
    test_conditions_row_by_row = as_test(conditions.check_conditions_row_by_row)
    test_missing_condition = as_test(conditions.check_missing_condition)
    test_negative_is_merged = as_test(conditions.check_negative_is_merged)
    test_encoders = as_test(conditions.check_encoders)

    # sampler and rollout
    test_sample_shape = as_test(sampling.check_sample_shape)
    test_samples_are_independent = as_test(sampling.check_samples_are_independent)
    test_guided_samples = as_test(sampling.check_guided_samples)
    test_sampler_follows_the_spec = as_test(sampling.check_sampler_follows_the_spec)
    test_rollout_is_sample = as_test(sampling.check_rollout_is_sample)
    test_rollout_exits = as_test(sampling.check_rollout_exits)
    test_rollout_predicts_at_its_exit = as_test(sampling.check_rollout_predicts_at_its_exit)
    test_rollout_trains_the_role = as_test(sampling.check_rollout_trains_the_role)
    test_generators = as_test(sampling.check_generators)
    test_solvers = as_test(sampling.check_solvers)
    test_stop = as_test(sampling.check_stop)
    test_sampler_refusals = as_test(sampling.check_sampler_refusals)

    # optional contracts
    test_capabilities = as_test(optional.check_capabilities)
    test_undeclared_options = as_test(optional.check_undeclared_options)
    test_frame_times = as_test(optional.check_frame_times)
    test_features = as_test(optional.check_features)
    test_discriminator = as_test(optional.check_discriminator)
    test_exits = as_test(optional.check_exits)
    test_tangents = as_test(optional.check_tangents)
    test_experts = as_test(optional.check_experts)
    test_images = as_test(optional.check_images)
    test_needs_image = as_test(optional.check_needs_image)

    # causal roles
    test_chunks = as_test(causal.check_chunks)
    test_causality = as_test(causal.check_causality)
    test_cached_calls = as_test(causal.check_cached_calls)
    test_teacher_forcing = as_test(causal.check_teacher_forcing)
    test_cache_rules = as_test(causal.check_cache_rules)
    test_streams = as_test(causal.check_streams)
