"""Versions of torch's flash attention: refused with the reason, or switched on and off again."""

from __future__ import annotations

import pytest
import torch
from distill_protocols import CapabilityError
from distill_trainer import use_flash_version
from torch.nn.attention import current_flash_attention_impl, register_flash_attention_impl


class Handle:
    def remove(self) -> None:
        """Nothing was registered."""


@pytest.mark.parametrize(
    ("name", "device", "capability", "words"),
    [
        ("flash3", "cpu", (9, 0), "'flash3' does not run on cpu: its kernels are for CUDA devices"),
        ("flash3", "cuda", (8, 0), "does not run on cuda: its kernels are for CUDA .* 9.x"),
        ("flash4", "cuda", (8, 9), "compute capability 9.x or 10.x"),
        ("flash3", "cuda", (9, 0), "torch cannot register FA3 of the package flash_attn_interface"),
    ],
)
def test_a_version_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: str,
    capability: tuple[int, int],
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with (
        pytest.raises(CapabilityError, match=words),
        use_flash_version(name, torch.device(device)),
    ):
        pass
    assert current_flash_attention_impl() is None


def test_a_version_is_torch_s_for_as_long_as_the_run_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_IMPLS", {})
    register_flash_attention_impl("FA4", register_fn=Handle)
    with use_flash_version("flash4", torch.device("cuda")):
        assert current_flash_attention_impl() == "FA4"
    assert current_flash_attention_impl() is None
    for name in (None, "native"):
        with use_flash_version(name, torch.device("cpu")):
            assert current_flash_attention_impl() is None
