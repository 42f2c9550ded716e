"""The suite that the package of a method runs with pytest."""

from __future__ import annotations

from distill_conformance.adapter_suite import as_test
from distill_conformance.method_checks import configs, randomness, steps


class MethodSuite:
    """Inherit from it in a class whose name begins with ``Test``, and write a fixture ``case``
    that returns a ``MethodCase``.

    To take a check out, set it to None in the subclass, and say why there.
    """

    # what the config declares
    test_plugin = as_test(configs.check_plugin)
    test_config_is_frozen = as_test(configs.check_config_is_frozen)
    test_config_needs_no_torch = as_test(configs.check_config_needs_no_torch)
    test_roles_and_turns = as_test(configs.check_roles_and_turns)
    test_capability_names = as_test(configs.check_capability_names)
    test_missing_roles = as_test(configs.check_missing_roles)
    test_needs_negative = as_test(configs.check_needs_negative)
    test_update_share = as_test(configs.check_update_share)
    test_trajectory_times = as_test(configs.check_trajectory_times)

    # steps
    test_losses = as_test(steps.check_losses)
    test_stepping = as_test(steps.check_stepping)
    test_isolation = as_test(steps.check_isolation)
    test_accumulation = as_test(steps.check_accumulation)
    test_neighbours = as_test(steps.check_neighbours)
    test_captions_alone = as_test(steps.check_captions_alone)
    test_resume = as_test(steps.check_resume)
    test_logged_samples = as_test(steps.check_logged_samples)

    # random numbers
    test_global_random_state = as_test(randomness.check_global_random_state)
    test_determinism = as_test(randomness.check_determinism)
    test_ranks = as_test(randomness.check_ranks)
