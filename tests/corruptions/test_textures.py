"""Drops of water and stains of mud, step by step against loops over pixels, and as a whole against OpenCV where it is installed."""
import numpy as np
import pytest
import torch
from scipy import ndimage

from archrepair.corruptions import textures
from archrepair.corruptions.catalogue import PARAMETERS
from archrepair.corruptions.randomness import image_keys, random_normal
from archrepair.corruptions.textures import canny_edges, chamfer_distance, equalize, mud_stains, water_drops


def blots_of(n, severity, count, dataset="t"):
    "The layers of liquid, gray levels B×n×n, as the benchmark makes them from the same normal numbers."
    mean, std, sigma, threshold, _, _ = PARAMETERS["spatter"][n][severity - 1]
    field = mean + std * random_normal(image_keys(dataset, torch.arange(count)), n * n).view(-1, n, n).double().numpy()
    field = ndimage.gaussian_filter(field, (0, sigma, sigma), mode="nearest", truncate=4)
    return np.floor(np.where(field < threshold, 0, field) * 255) % 256


def slow_edges(x):
    "Canny with thresholds 50 and 150, pixel by pixel; angles from arctan2."
    n = len(x)
    dx, dy = (ndimage.sobel(x, axis, mode="nearest") for axis in (1, 0))
    size = np.pad(np.abs(dx) + np.abs(dy), 1)
    candidate = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            angle = np.degrees(np.arctan2(abs(dy[i, j]), abs(dx[i, j])))
            here, at = size[i + 1, j + 1], lambda a, b, i=i, j=j: size[i + 1 + a, j + 1 + b]
            if here <= 50:
                continue
            if angle < 22.5:
                candidate[i, j] = here > at(0, -1) and here >= at(0, 1)
            elif angle > 67.5:
                candidate[i, j] = here > at(-1, 0) and here >= at(1, 0)
            else:
                side = 1 if dx[i, j] * dy[i, j] > 0 else -1
                candidate[i, j] = here > at(-1, -side) and here > at(1, side)
    labels, _ = ndimage.label(candidate, np.ones((3, 3)))
    strong = np.unique(labels[candidate & (size[1:-1, 1:-1] > 150)])
    return np.isin(labels, strong[strong > 0])


def slow_distance(edge):
    "Length of the shortest chain of moves to any edge, from its closed form."
    rows, columns = np.nonzero(edge)
    y, x = np.indices(edge.shape)
    far, near = (f(np.abs(y[..., None] - rows), np.abs(x[..., None] - columns)) for f in (np.maximum, np.minimum))
    length = np.where(far >= 2 * near, far - 2 * near + 2.1969 * near, 1.4 * (2 * near - far) + 2.1969 * (far - near))
    return np.minimum(length.min(-1, initial=20), 20)


def slow_equalize(x):
    levels, count = np.unique(x, return_counts=True)
    if len(levels) == 1:
        return x
    scale = np.float32(255) / np.float32(x.size - count[0])  # single precision decides ties, as in OpenCV
    table = dict(zip(levels, np.round(np.float32(np.cumsum(count) - count[0]) * scale)))
    return np.vectorize(table.get)(x)


@pytest.mark.parametrize(("n", "severity"), [(32, 1), (32, 2), (32, 3), (64, 1), (64, 3)])
def test_edges_and_distances(n, severity):
    layers = blots_of(n, severity, 4)
    edges = canny_edges(torch.from_numpy(layers))
    assert np.array_equal(edges, [slow_edges(layer) for layer in layers]) and edges.any()
    assert np.allclose(chamfer_distance(edges), [slow_distance(edge) for edge in edges.numpy()], atol=1e-5)


def test_edges_grow_along_weak_ones_and_are_thin():
    x = torch.zeros(1, 20, 20)
    x[0, :, 10:] = 14  # gradient 56, above the lower threshold alone
    assert not canny_edges(x).any()
    x[0, 5, 10:] = 60  # one strong place sets off the whole line
    edge = canny_edges(x)[0]
    assert edge[:, 8:12].any(1).sum() >= 16 and edge[10].sum() == 1


def test_no_edge_is_far_away():
    assert torch.equal(chamfer_distance(torch.zeros(2, 8, 8, dtype=torch.bool)), torch.full((2, 8, 8), 20.0))


def test_equalize():
    x = torch.from_numpy(np.random.default_rng(0).integers(3, 21, (4, 16, 16))).float()
    x[1] = 7
    x[2, :8] = 3
    assert np.array_equal(equalize(x), [slow_equalize(y) for y in x.numpy()])


@pytest.mark.parametrize(("n", "severity"), [(32, 4), (32, 5), (64, 4), (224, 5)])
def test_mud(n, severity):
    mean, std, sigma, threshold, blur, _ = PARAMETERS["spatter"][n][severity - 1]
    keys = image_keys("t", torch.arange(2))
    field = mean + std * random_normal(keys, n * n).view(-1, n, n).double().numpy()
    covered = ndimage.gaussian_filter(field, (0, sigma, sigma), mode="nearest", truncate=4) > threshold
    stain = ndimage.gaussian_filter(covered.astype(float), (0, blur, blur), mode="nearest", truncate=4)
    ours = mud_stains(n, mean, std, sigma, threshold, blur, keys)
    safe = np.abs(stain - 0.8) > 1e-5
    assert np.allclose(ours[safe], np.where(stain < 0.8, 0, stain)[safe], atol=1e-5) and safe.mean() > 0.99
    assert 0 < (ours > 0).float().mean() < 0.5


def test_water_shines_at_its_brightest_and_nowhere_else():
    light = water_drops(32, 0.65, 0.1, 0.8, 0.7, image_keys("w", torch.arange(50)))
    assert torch.equal(light.amax((1, 2)), torch.ones(50)) and not light.amin()
    blots = torch.from_numpy(blots_of(32, 2, 50, "w"))
    assert not light[blots == 0].any() and 0.02 < (light > 0).float().mean() < 0.4


def test_a_dry_lens_stays_dry():
    assert not water_drops(32, 0.1, 0.01, 0.7, 0.7, image_keys("dry", torch.arange(2))).any()


@pytest.mark.parametrize(("n", "severity"), [(n, s) for n in (32, 64, 224) for s in (1, 2, 3)])
def test_water_against_opencv(n, severity, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    layers = blots_of(n, severity, 20 if n < 224 else 3).astype(np.uint8)
    expected = []
    for layer in layers:
        distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5)
        distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
        embossed = cv2.filter2D(distance, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
        light = layer * cv2.blur(embossed, (3, 3)).astype(np.float32)
        expected.append(light / light.max())
    monkeypatch.setattr(textures, "_liquid", lambda *_: torch.from_numpy(layers.astype(np.float32) + 0.5) / 255)
    assert np.allclose(water_drops(n, 0, 0, 0, 0, torch.zeros(1, 2, dtype=torch.int32)), expected, atol=1e-5)
