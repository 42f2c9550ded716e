"""How different samples of one prompt are: 0 where a student gives one clip a prompt."""

import itertools

import torch
from torch import Tensor


def pair_distances(values: Tensor, groups: Tensor) -> Tensor:
    """Compute the mean distance of pairs within each group, `[G]`, in the unit of the values.

    The distance of a pair is the root of the mean squared difference over all numbers of a sample,
    so it does not grow with their count. Groups come in the order of their ids; nan for a group of
    one.

    Args:
        values: `[N, ...]` clips, latents or features.
        groups: `[N]` integer ids of prompts.
    """
    if groups.shape != values.shape[:1]:
        raise ValueError(
            f"groups of shape {tuple(groups.shape)} for {tuple(values.shape)} values: one id a "
            "sample is needed, because pairs are formed within a group; pass the index of each "
            "sample's prompt."
        )
    flat = values.float().flatten(1)
    distances = []
    for group in groups.unique():
        pairs = itertools.combinations(flat[groups == group], 2)
        each = [(one - other).square().mean().sqrt() for one, other in pairs]
        distances.append(torch.stack(each).mean() if each else flat.new_tensor(torch.nan))
    return torch.stack(distances) if distances else flat.new_zeros(0)
