"Stylizers: statistics that become those of the style, and finding one by its name."
import pytest
import torch

from archrepair.baselines.parts.styles import (
    STYLIZERS,
    find_stylizer,
    fourier,
    moments,
    restyle,
)
from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.wavelets import haar, haar_wct
from support.textures import textured_pictures

SIZES = (8, 32, 64, 224)


def moments_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Mean and covariance of B×C×P."
    values = values.double()
    centered = values - values.mean(-1, keepdim=True)
    return values.mean(-1), centered @ centered.mT / values.shape[-1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_painted_statistics_are_the_styles(size, levels):
    content, style = textured_pictures(2, size, 1), textured_pictures(2, size, 2)
    painted = haar_wct(content, style, levels)
    ours, theirs = painted, style
    for _ in range(levels):  # every detail band of every level
        ours, theirs = haar(ours.double()), haar(theirs.double())
        for band in range(1, 4):
            for a, b in zip(moments_of(ours[:, :, band].flatten(2)), moments_of(theirs[:, :, band].flatten(2))):
                assert torch.allclose(a, b, rtol=1e-4, atol=0.02)
        ours, theirs = ours[:, :, 0], theirs[:, :, 0]
    for found, expected in ((painted, style), (ours, theirs)):  # the whole image, and the last average
        for a, b in zip(moments_of(found.flatten(2)), moments_of(expected.flatten(2))):
            assert torch.allclose(a, b, rtol=1e-4, atol=0.05)
    for stylizer in (moments, fourier):
        assert torch.allclose(stylizer(content, style).mean((2, 3)), style.mean((2, 3)), atol=0.05)


def test_alpha():
    content, style = textured_pictures(3, 32, 1), textured_pictures(3, 32, 2)
    for stylizer in STYLIZERS.values():
        assert torch.equal(restyle(content, style, stylizer, 0.0), content)
        whole = restyle(content, style, stylizer, 1.0)
        assert torch.equal(whole, stylizer(content, style).clamp(0, 255).round())
        half = restyle(content, style, stylizer, 0.5)
        assert torch.allclose(half, (0.5 * content + 0.5 * stylizer(content, style)).clamp(0, 255).round(), atol=1)
        assert torch.equal(half, half.round()) and 0 <= float(half.min()) and float(half.max()) <= 255


@pytest.mark.parametrize("name", sorted(STYLIZERS))
@pytest.mark.parametrize("size", [*SIZES, 9, 33])
def test_an_image_in_its_own_style_stays(name, size):
    x = textured_pictures(2, size, 3)
    assert float((restyle(x, x, STYLIZERS[name]) - x).abs().max()) <= 1
    assert STYLIZERS[name](x, textured_pictures(2, size, 4)).shape == x.shape


@pytest.mark.parametrize("name", sorted(STYLIZERS))
def test_degenerate_images_do_no_harm(name):
    "Gray, flat and black images, as content and as style."
    gray = textured_pictures(1, 32)[:, :1].expand(1, 3, 32, 32)
    cases = [gray, torch.full((1, 3, 32, 32), 77.0), torch.zeros(1, 3, 32, 32), textured_pictures(1, 32)]
    for content in cases:
        for style in cases:
            painted = STYLIZERS[name](content, style)
            assert painted.isfinite().all() and float(painted.abs().max()) < 3000
    assert torch.allclose(haar_wct(gray, cases[3]).mean((2, 3)), cases[3].mean((2, 3)), atol=0.05)
    painted = haar_wct(cases[3], gray)
    assert torch.allclose(painted[:, :1], painted, atol=0.05)  # a gray style makes gray images
    assert torch.allclose(haar_wct(cases[1], cases[3]).mean((2, 3)), cases[3].mean((2, 3)), atol=0.05)


def test_images_are_painted_one_by_one():
    content, style = textured_pictures(5, 16, 1), textured_pictures(5, 16, 2)
    for stylizer in STYLIZERS.values():
        for i in range(5):
            assert torch.allclose(stylizer(content, style)[i], stylizer(content[i:i + 1], style[i:i + 1])[0], atol=1e-3)


def test_amplitudes_are_the_styles_and_phases_the_contents():
    content, style = textured_pictures(1, 16, 1).double(), textured_pictures(1, 16, 2).double()
    spectrum, other, found = (torch.fft.fft2(x) for x in (content, style, fourier(content, style)))
    assert torch.allclose(found.abs(), other.abs(), atol=1e-6 * float(other.abs().max()))
    strong = other.abs() > 1
    assert torch.allclose((found / spectrum)[strong].angle(), torch.zeros(int(strong.sum()), dtype=torch.float64), atol=1e-6)


def test_finding_a_stylizer():
    assert find_stylizer("moments") is moments and find_stylizer("archrepair.baselines.parts.styles:fourier") is fourier
    with pytest.raises(ArchrepairError, match="unknown stylizer 'haar-wtc': did you mean 'haar-wct'"):
        find_stylizer("haar-wtc")
    for name in ("no.such:thing", "archrepair.baselines.parts.styles:nothing", "archrepair.baselines.parts.styles:__name__"):
        with pytest.raises(ArchrepairError, match="cannot be called"):
            find_stylizer(name)
    with pytest.raises(ArchrepairError, match=r"returned \(2, 3, 4, 4\) for \(2, 3, 8, 8\)"):
        restyle(textured_pictures(2, 8), textured_pictures(2, 8), lambda c, s: c[..., ::2, ::2])
