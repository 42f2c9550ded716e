"""Latents as the tokens that an LTX transformer reads, and back.

Letters: B batch, C channels, T latent frames, H and W latent height and width; L tokens of D
numbers each, in the order of T, H, W. Published models have patches of one cell, so L = T H W and
D = C.
"""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor, *, patch_t: int = 1, patch_hw: int = 1) -> Tensor:
    """Cut latents [B, C, T, H, W] into tokens [B, L, D].

    A token holds ``patch_t`` x ``patch_hw`` x ``patch_hw`` cells, D = C patch_t patch_hw^2 with
    the channel slowest. With patches of one cell the result is a view.

    Raises:
        ValueError: T, H or W is not divisible by its patch.
    """
    _check_divisible(tuple(latents.shape[2:]), patch_t, patch_hw)
    cut = latents.unflatten(4, (-1, patch_hw)).unflatten(3, (-1, patch_hw))
    cut = cut.unflatten(2, (-1, patch_t))  # [B, C, T', p_t, H', p, W', p]
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(
    tokens: Tensor, size: tuple[int, int, int], *, patch_t: int = 1, patch_hw: int = 1
) -> Tensor:
    """Put tokens [B, L, D] together to latents [B, C, T, H, W].

    Args:
        size: T, H and W in latent cells. (``LTXPipeline._unpack_latents`` counts patches.)

    Raises:
        ValueError: ``size`` does not make L tokens, or D numbers are not whole channels.
    """
    _check_divisible(size, patch_t, patch_hw)
    frames, height, width = size[0] // patch_t, size[1] // patch_hw, size[2] // patch_hw
    cells = patch_t * patch_hw * patch_hw
    if tokens.shape[1] != frames * height * width or tokens.shape[2] % cells:
        raise ValueError(
            f"tokens are {list(tokens.shape)}; latents of {size[0]} x {size[1]} x {size[2]} cells "
            f"in patches of {patch_t} x {patch_hw} x {patch_hw} make {frames * height * width} "
            f"tokens of a multiple of {cells} numbers"
        )
    cut = tokens.unflatten(2, (-1, patch_t, patch_hw, patch_hw))
    cut = cut.unflatten(1, (frames, height, width))  # [B, T', H', W', C, p_t, p, p]
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def _check_divisible(size: tuple[int, ...], patch_t: int, patch_hw: int) -> None:
    if size[0] % patch_t or size[1] % patch_hw or size[2] % patch_hw:
        raise ValueError(
            f"latents of {size[0]} x {size[1]} x {size[2]} cells must be divisible by patches of "
            f"{patch_t} x {patch_hw} x {patch_hw}: a token is a whole patch"
        )
