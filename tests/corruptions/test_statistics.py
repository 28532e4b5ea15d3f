"""Image statistics against numpy's Fourier transform and median, at odd sizes, with channels of any number, and exported."""
import math

import numpy as np
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.statistics import BINS, HIGHEST, ImageStatistics, frequencies, image_statistics, ring_matrix

SIZES = [(32, 32), (24, 40), (33, 17), (8, 8), (4, 5)]


def pictures(count, height, width, channels=3, seed=0):
    "Random 8-bit pictures, smooth in one direction."
    x = torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed)).cumsum(2)
    return (x / x.amax((1, 2, 3), keepdim=True) * 255).to(torch.uint8)


def slow(image, bins=BINS):
    "Statistics of one image H×W×C from the full transform of numpy, coefficient by coefficient."
    x = image.numpy() / 255
    gray = x.mean(2)
    power = np.abs(np.fft.fft2(gray - gray.mean())) ** 2 / gray.size
    f = np.hypot(np.fft.fftfreq(gray.shape[0])[:, None], np.fft.fftfreq(gray.shape[1]))
    ring = np.minimum((f / math.sqrt(0.5) * bins).astype(int), bins - 1)
    ring[0, 0] = -1
    present = [b for b in range(bins) if (ring == b).any()]
    spectrum = [power[ring == min(present, key=lambda p: abs(p - b))].mean() for b in range(bins)]
    steps = np.sort(np.abs(np.r_[np.diff(gray, axis=0).ravel(), np.diff(gray, axis=1).ravel()]))
    channels = [f(axis=(0, 1)) for f in (x.mean, x.std, x.min, x.max)]
    return np.concatenate([np.log(np.array(spectrum) + 1e-7), *channels, [np.log(steps[(len(steps) - 1) // 2] + 1e-3)]])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_against_numpy(size, channels):
    images = pictures(5, *size, channels)
    statistics = image_statistics(images)
    assert statistics.shape == (5, BINS + 4 * channels + 1) and len(ImageStatistics(*size, channels).names) == statistics.shape[1]
    assert np.allclose(statistics, np.stack([slow(image) for image in images]), atol=2e-4)


@pytest.mark.parametrize("size", SIZES)
def test_rings_are_averages(size):
    matrix = ring_matrix(*size)
    assert torch.allclose(matrix.sum(0), torch.ones(BINS)) and not matrix[0].any()
    assert frequencies(*size).max() <= HIGHEST + 1e-12


def test_white_noise_has_its_variance_at_every_frequency():
    x = 0.5 + 0.05 * torch.randn(400, 1, 32, 24, generator=torch.Generator().manual_seed(1))
    power = image_statistics(x)[:, :BINS].exp().mean(0)
    assert torch.allclose(power, torch.full((BINS,), 0.05**2), rtol=0.1)


def test_floats_and_bytes_agree_and_values_that_are_not_finite_are_replaced():
    images = pictures(3, 16, 16)
    x = images.permute(0, 3, 1, 2) / 255
    assert torch.equal(image_statistics(images), image_statistics(x))
    x[0, 0, 0, 0], x[1, 1, 2, 3], x[2] = torch.nan, torch.inf, torch.nan
    statistics = image_statistics(x)
    assert statistics.isfinite().all()
    assert image_statistics(torch.zeros(1, 16, 16, 3, dtype=torch.uint8)).isfinite().all()


def test_batches_and_none_at_all():
    images = pictures(50, 224, 224)
    assert torch.allclose(image_statistics(images)[45:], image_statistics(images[45:]), atol=1e-5)
    assert image_statistics(images[:0]).shape == (0, 29)


def test_mistakes():
    for images in (torch.zeros(3, 32, 32), torch.zeros(1, 32, 32, 3, dtype=torch.int64)):
        with pytest.raises(ArchrepairError, match="expected uint8 N×H×W×C, or float N×C×H×W"):
            image_statistics(images)
    with pytest.raises(ArchrepairError, match="at least 4×4"):
        ImageStatistics(3, 32)


def test_matrices_are_not_weights():
    assert not ImageStatistics(32, 32).state_dict()


def test_exported_with_another_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, batch = ImageStatistics(24, 40).eval(), {"x": {0: torch.export.Dim("batch")}}
    x = pictures(7, 24, 40).permute(0, 3, 1, 2).contiguous() / 255
    program = torch.export.export(module, (x[:2],), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "s.pt2")
    assert torch.allclose(torch.export.load(tmp_path / "s.pt2").module()(x), module(x), atol=1e-5)
    model = torch.onnx.export(module, (x[:2],), dynamo=True, verbose=False, dynamic_shapes=batch).model_proto
    assert not any("FFT" in node.op_type or node.op_type == "DFT" for node in model.graph.node)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert np.allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], module(x), atol=1e-4)
