"""Measures of clips and latents, against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from distill_evaluation import measures
from distill_evaluation.measures import LatentMoments
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional


def texture(side: int = 96, seed: int = 0, width: float = 2.0) -> np.ndarray:
    """Return a smooth random picture [side, side] in [0, 1]."""
    noise = np.random.default_rng(seed).standard_normal((side, side))
    smooth = ndimage.gaussian_filter(noise, width, mode="wrap")
    return 0.5 + 0.4 * smooth / np.abs(smooth).max()


def moving(step: tuple[float, float], frames: int = 3, side: int = 96) -> torch.Tensor:
    """Return a clip [1, 3, F, H, W] whose picture moves by `step` (down, right) a frame."""
    picture = texture(side)
    shown = [
        ndimage.shift(picture, (step[0] * n, step[1] * n), order=3, mode="grid-wrap")
        for n in range(frames)
    ]
    return torch.tensor(np.stack(shown), dtype=torch.float32).expand(1, 3, -1, -1, -1)


def random_clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 4, 24, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [(0.0, 1.0), (0.5, 0.0), (2.0, -1.5), (-4.0, 3.0)])
def test_flow_finds_how_far_a_picture_moved(step: tuple[float, float]) -> None:
    clip = moving(step)[0, 0]
    flow = measures.optical_flow(clip[:1], clip[1:2])[0, :, 16:-16, 16:-16]
    expected = torch.tensor([step[1], step[0]]).view(2, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow.mean((1, 2)), expected[:, 0, 0], rtol=0.05, atol=0.02)
    assert float((flow - expected).norm(dim=0).median()) < 0.1


def test_the_length_of_the_flow_is_in_pixels_of_the_clip() -> None:
    clip = functional.interpolate(moving((1.0, 0.0))[0], (384, 384), mode="bilinear")[None]
    assert float(measures.flow_magnitude(clip)) == pytest.approx(4, rel=0.1)
    halves = torch.cat([moving((0.0, 1.0)), moving((0.0, 2.0))])
    one, two = measures.flow_magnitude(halves).tolist()
    assert two / one == pytest.approx(2, rel=0.1)


def test_what_stands_still_has_no_motion_and_noise_has_little() -> None:
    still = moving((0.0, 0.0))
    assert float(measures.flow_magnitude(still)) == 0
    assert float(measures.frame_difference(still)) == 0
    assert measures.flow_magnitude(still[:, :, :1]).tolist() == [0]
    assert measures.frame_difference(still[:, :, :1]).tolist() == [0]
    noisy = 0.5 + torch.randn(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) / 255
    assert float(measures.flow_magnitude(noisy)) < 0.1


def test_difference_of_frames_is_that_of_their_pixels() -> None:
    clip = torch.zeros(1, 3, 3, 8, 8)
    clip[:, :, 1] = 0.5
    assert float(measures.frame_difference(clip)) == pytest.approx(0.5)


def test_sharpness_is_the_variance_of_scipys_laplacian_and_falls_with_blur() -> None:
    clips = random_clips()
    grey = (clips * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(1).numpy()
    expected = [
        np.mean([ndimage.laplace(frame)[1:-1, 1:-1].var(ddof=1) for frame in clip]) for clip in grey
    ]
    assert measures.sharpness(clips).tolist() == pytest.approx(expected, rel=1e-4)
    blurred = functional.avg_pool3d(clips, (1, 3, 3), 1, (0, 1, 1))
    assert (measures.sharpness(blurred) < 0.2 * measures.sharpness(clips)).all()


def test_colours_have_their_closed_forms() -> None:
    grey = torch.rand(1, 1, 2, 4, 4).expand(1, 3, 2, 4, 4)
    assert float(measures.saturation(grey)) == pytest.approx(0, abs=1e-6)
    assert float(measures.colourfulness(grey)) == pytest.approx(0, abs=1e-6)
    red = torch.zeros(1, 3, 2, 4, 4)
    red[:, 0] = 0.8
    assert float(measures.saturation(red)) == pytest.approx(1)
    assert float(measures.colourfulness(red)) == pytest.approx(0.3 * math.hypot(0.8, 0.4))
    pink = torch.full((1, 3, 2, 4, 4), 0.4)
    pink[:, 0] = 0.8
    assert float(measures.saturation(pink)) == pytest.approx(0.5)
    assert float(measures.saturation(torch.zeros(1, 3, 2, 4, 4))) == 0
    halves = torch.zeros(1, 3, 1, 4, 4)
    halves[..., :2] = 1
    assert float(measures.contrast(halves)) == pytest.approx(0.5)
    assert float(measures.clipped_share(halves)) == 1
    assert float(measures.clipped_share(halves * 0.5 + 0.2)) == 0


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of two pictures, as Wang et al. write it, with scipy's Gaussian of radius 5."""

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    m1, m2 = mean(first), mean(second)
    v1, v2 = mean(first * first) - m1 * m1, mean(second * second) - m2 * m2
    cov = mean(first * second) - m1 * m2
    score = (2 * m1 * m2 + 1e-4) * (2 * cov + 9e-4)
    return float((score / ((m1 * m1 + m2 * m2 + 1e-4) * (v1 + v2 + 9e-4))).mean())


def test_likeness_against_scipy() -> None:
    first, second = random_clips(), random_clips(seed=1)
    second = 0.7 * first + 0.3 * second
    pairs = zip(first.double().numpy(), second.double().numpy(), strict=True)
    expected = [
        np.mean([by_scipy(a[c, f], b[c, f]) for c in range(3) for f in range(4)]) for a, b in pairs
    ]
    assert measures.ssim(first, second).tolist() == pytest.approx(expected, rel=1e-4)
    assert measures.ssim(first, first).tolist() == pytest.approx([1, 1])
    darker = first.clamp(0.1, 1)
    assert measures.psnr(darker, darker - 0.1).tolist() == pytest.approx([20, 20], abs=1e-3)
    assert measures.psnr(first, first).tolist() == pytest.approx([100, 100])


def test_pairs_are_formed_within_a_prompt() -> None:
    values = torch.tensor([[0.0, 0.0], [3.0, 3.0], [9.0, 9.0], [7.0, 0.0]])
    distances = measures.pair_distances(values, torch.tensor([1, 1, 1, 0]))
    assert distances[0].isnan()
    assert float(distances[1]) == pytest.approx((3 + 9 + 6) / 3)


def test_moments_pool_to_the_statistics_of_all_numbers() -> None:
    latents = torch.randn(5, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 1.7 + 0.4
    moments = LatentMoments.cat([LatentMoments.of_latents(part) for part in latents.split(2)])
    assert moments.mean == pytest.approx(float(latents.mean()), rel=1e-5)
    assert moments.std == pytest.approx(float(latents.std(correction=0)), rel=1e-5)
    by_channel = latents.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.channel_means, by_channel.mean(1))
    torch.testing.assert_close(moments.channel_stds, by_channel.std(1, correction=0))


SINGLE = {
    name: getattr(measures, name)
    for name in (
        "frame_difference", "flow_magnitude", "sharpness", "saturation", "colourfulness",
        "contrast", "clipped_share",
    )
}  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_a_clips_numbers_do_not_depend_on_its_batch(seed: int) -> None:
    clips, others = random_clips(3, seed), random_clips(3, seed + 1)
    for name, measure in SINGLE.items():
        torch.testing.assert_close(measure(clips)[1:2], measure(clips[1:2]), msg=name)
    for compare in (measures.psnr, measures.ssim):
        torch.testing.assert_close(
            compare(clips, others)[2:], compare(clips[2:], others[2:]), rtol=1e-5, atol=1e-6
        )


def test_other_shapes_are_refused() -> None:
    for measure in SINGLE.values():
        with pytest.raises(ValueError, match=r"\[N, 3, F, H, W\]"):
            measure(torch.zeros(3, 4, 8, 8))
    for compare in (measures.psnr, measures.ssim):
        with pytest.raises(ValueError, match="one shape"):
            compare(random_clips(2), random_clips(3))
    with pytest.raises(ValueError, match="11 x 11"):
        measures.ssim(torch.zeros(1, 3, 1, 8, 16), torch.zeros(1, 3, 1, 8, 16))
    with pytest.raises(ValueError, match="4 x 4"):
        measures.sharpness(torch.zeros(1, 3, 1, 3, 16))
    with pytest.raises(ValueError, match="one id a sample"):
        measures.pair_distances(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[N, C, T, H, W\]"):
        LatentMoments.of_latents(torch.zeros(2, 4, 3, 3))
