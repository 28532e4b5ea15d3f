"Images made when they are asked for: reading D_repair, moving images, gray levels."
import math

import pytest
import torch

from archrepair.baselines.parts import augmented
from archrepair.baselines.parts.augmented import PADDINGS, Augmented, Images, to_float, to_uint8, warp
from archrepair.baselines.parts.common import Problem
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.training.rows import draw_view
from support.textures import smooth_pictures

SIZES = (8, 32, 64, 224)


def small_data(data: RepairData, n: int = 48) -> RepairData:
    few = lambda part, k: part.select(torch.arange(min(k, len(part))))
    parts = few(data.failures, 16), few(data.train, n), few(data.val, 32), data.transform, few(data.val_failures, 4), data.failure_rate
    return RepairData(*parts)


@pytest.fixture
def little(problem):
    return Problem(problem.network, small_data(problem.scenario.data))


@pytest.mark.parametrize(("views", "failure_views"), [(1, 1), (2, 3)])
def test_images_come_in_the_order_asked_for(little, views, failure_views):
    images, data = Images(little, views, failure_views), little.data
    n, failed = len(data.train), len(data.failures)
    assert len(images) == n + failed * failure_views and images.failures == failed * failure_views
    positions = torch.tensor([n + failed * failure_views - 1, 0, n, 7, n + 3, 1])
    for epoch in (0, 1, 2):
        found = images.batch(positions, epoch)
        for position, image in zip(positions.tolist(), found):
            if position < n:
                expected = draw_view(data.train.images[position][None], epoch % views)[0]
            else:
                view, which = divmod(position - n, failed)
                expected = draw_view(data.failures.images, view)[which]
            assert torch.equal(image, expected)
    for alone in (torch.tensor([3]), torch.tensor([n + 1])):
        assert images.batch(alone).shape == (1, 32, 32, 3)
    assert images.labels[n:].equal(data.failures.labels.repeat(failure_views))


def test_images_that_are_decoded_on_demand_are_read_as_they_are_needed(little):
    class Lazy:
        size, asked = 32, 0

        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, positions):
            Lazy.asked += len(positions)
            return self.images[positions]

    data, positions = little.data, torch.tensor([2, 60, 4])
    train = ImageSet(Lazy(data.train.images), data.train.labels, data.train.classes)
    images = Images(Problem(little.original, RepairData(data.failures, train, data.val, data.transform, data.val_failures)))
    assert Lazy.asked == 0
    assert images.batch(positions).equal(Images(little).batch(positions)) and Lazy.asked == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_no_move_changes_nothing(size, padding):
    images = smooth_pictures(2, size)
    assert torch.equal(to_uint8(warp(to_float(images), torch.eye(2, 3).expand(2, 3, 2, 3), padding)[:, 1]), images)


def test_a_moved_image_is_read_where_its_matrix_says():
    "Pixel by pixel, on images that are not square."
    image, generator = to_float(smooth_pictures(1, 10, width=14))[0], torch.Generator().manual_seed(3)
    matrices = torch.eye(2, 3) + 0.3 * torch.randn(3, 2, 3, generator=generator) * torch.tensor([1, 1, 5.0])
    fast = warp(image[None], matrices[None])[0]
    at = lambda y, x: image[:, y, x] if 0 <= y < 10 and 0 <= x < 14 else torch.zeros(3)
    for found, ((a, b, tx), (c, d, ty)) in zip(fast, matrices.tolist()):
        for i in range(10):
            for j in range(14):
                x, y = j - 6.5, i - 4.5
                sx, sy = a * x + b * y + tx + 6.5, c * x + d * y + ty + 4.5
                x0, y0 = math.floor(sx), math.floor(sy)
                u, v = sx - x0, sy - y0
                upper, lower = ((1 - u) * at(row, x0) + u * at(row, x0 + 1) for row in (y0, y0 + 1))
                expected = (1 - v) * upper + v * lower
                assert torch.allclose(found[:, i, j], expected, atol=2e-2)


def test_gray_levels_are_rounded_and_clipped():
    levels = torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]).expand(1, 3, 1, 5)
    assert to_uint8(levels)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_augmented_is_abstract():
    with pytest.raises(TypeError):
        Augmented()
    assert augmented.AUGMENTATION_RECIPES.keys() == {"default", "paper"}
