"""Wavelet bands: orthonormal and undone; colors that get the mean and covariance of others."""
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archrepair.corruptions.wavelets import haar, inverse_haar, whiten_and_color
from support.textures import textured_pictures


def test_haar_by_hand():
    image = torch.tensor([[1.0, 2, 5, 5], [3, 4, 5, 5]])
    bands = haar(image)
    assert bands[:, 0, 0].tolist() == [5, -1, -2, 0] and bands[:, 0, 1].tolist() == [10, 0, 0, 0]
    assert torch.equal(inverse_haar(bands), image)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_haar_is_orthonormal_and_undone(h, w, seed):
    x = torch.randn(2, 3, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(inverse_haar(haar(x)), x) and torch.isclose(haar(x).square().sum(), x.square().sum())


def test_whitening_and_coloring_by_hand():
    content, style = (textured_pictures(3, 16, seed).double().flatten(2) for seed in (0, 1))
    found = whiten_and_color(content, style[..., :100])
    for c, s, f in zip(content.numpy(), style[..., :100].numpy(), found.numpy()):
        root = lambda m, e: (lambda v, w: w @ np.diag(v ** e) @ w.T)(*np.linalg.eigh(np.cov(m, bias=True)))
        expected = root(s, 0.5) @ root(c, -0.5) @ (c - c.mean(1, keepdims=True)) + s.mean(1, keepdims=True)
        assert np.allclose(f, expected)
