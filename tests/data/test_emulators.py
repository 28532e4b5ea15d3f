"""Emulators: the formula against a slow one, shapes, types and devices, draws, and damage whose parameters are known."""
import json

import numpy as np
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import EMULATORS
from archrepair.corruptions.statistics import BINS, HIGHEST, frequencies, image_statistics
from archrepair.data import emulators as module
from archrepair.data.emulators import Blur, Custom, Learned, Painter, Profile, Spectral, Style, Unchanged, emulate, energy_distance


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height=32, width=32, channels=3, seed=0):
    "Smooth random pictures, uint8, away from black and white."
    x = torch.randn(count, channels, height, width, generator=generator(seed)).cumsum(2).cumsum(3)
    x = x - x.mean((1, 2, 3), keepdim=True)
    x = 128 + 30 * x / x.std((1, 2, 3), keepdim=True) + 15 * torch.randn(count, 1, 1, 1, generator=generator(seed + 1))
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def noisy(images, sigma, seed=5):
    return (images + 255 * sigma * torch.randn(images.shape, generator=generator(seed))).clamp(0, 255).round().byte()


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (33, 17)])
def test_profile_against_the_full_transform(size):
    images = pictures(6, *size)
    profile, x = Profile.of(images), images.numpy() / 255
    f = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1]))
    ring = np.minimum((f / HIGHEST * BINS).astype(int), BINS - 1)
    ring[0, 0] = -1
    for channel in range(3):
        power = np.mean([np.abs(np.fft.fft2(y - y.mean())) ** 2 / y.size for y in x[..., channel]], 0)
        for b in (b for b in range(BINS) if (ring == b).any()):
            assert np.isclose(profile.power[channel, b], power[ring == b].mean(), rtol=1e-3)
    assert np.allclose(profile.mean, x.mean((0, 1, 2))) and np.allclose(profile.spread, x.mean((1, 2)).std(0, ddof=1))


def test_noise_is_found_at_its_level_and_comes_back():
    train, failing = pictures(300), noisy(pictures(300, seed=9), 0.06)
    spectral = Spectral.fit(failing, train, generator())
    assert abs(float(spectral.noise[:, 4:].mean()) - 0.06) < 0.004
    residual = emulate(spectral, train, generator()).float() - train.float()
    assert abs(float(residual.std()) / 255 - 0.06) < 0.006
    draws = [emulate(spectral, train, generator(seed)).float() for seed in (0, 1)]
    between = draws[0] - draws[1]
    assert abs(float((between[:-1] * between[1:]).mean() / between.var())) < 0.01, "each image has noise of its own"


def test_contrast_is_found_as_one_factor():
    train = pictures(300)
    mean = train.float().mean((1, 2), keepdim=True)
    failing = (mean + 0.4 * (train.float() - mean)).round().byte()
    spectral = Spectral.fit(failing, train, generator())
    assert torch.allclose(spectral.gain[:, :5], torch.tensor(0.4).double(), atol=0.02) and not spectral.noise[:, :5].any()
    assert (emulate(spectral, train, generator()).int() - failing.int()).abs().float().mean() < 1


def test_brightness_moves_the_mean_alone():
    train = pictures(200)
    spectral = Spectral.fit((train.int() + 40).clamp(max=255).byte(), train, generator())
    slope, offset = spectral.tone
    assert torch.allclose(slope, torch.ones(3).double(), atol=0.02) and torch.allclose(offset, torch.tensor(40 / 255).double(), atol=0.01)


def test_a_filter_is_applied_by_frequency():
    "A gain that is one below a frequency and zero above leaves slow waves and removes fast ones."
    power = torch.ones(1, BINS, dtype=torch.float64)
    half = torch.where(torch.arange(BINS) < 8, 1.0, 0.0).double()[None]
    one = torch.ones(1, dtype=torch.float64)
    spectral = Spectral(Profile(power, one / 2, one, 10), Profile(half, one / 2, one, 10))
    wave = lambda cycles: 0.5 + 0.3 * torch.cos(2 * torch.pi * cycles / 32 * torch.arange(32)).expand(1, 1, 32, 32)
    assert torch.allclose(spectral(wave(4), generator()), wave(4), atol=1e-5)
    assert torch.allclose(spectral(wave(16), generator()), torch.tensor(0.5), atol=1e-5)
    assert float(frequencies(32, 32)[0, 4]) < HIGHEST / 2 < float(frequencies(32, 32)[0, 16])


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (7, 9), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3])
def test_types_shapes_and_draws(size, channels):
    train = pictures(4, *size, channels)
    spectral = Spectral.fit(noisy(train, 0.1), train, generator())
    bytes_ = emulate(spectral, train, generator())
    assert bytes_.dtype == torch.uint8 and bytes_.shape == train.shape
    floats = train.permute(0, 3, 1, 2) / 255
    same = emulate(spectral, floats, generator())
    assert same.dtype == floats.dtype and torch.equal((same * 255).round().byte().permute(0, 2, 3, 1), bytes_)
    assert torch.equal(bytes_, emulate(spectral, train, generator()))
    assert not torch.equal(bytes_, emulate(spectral, train, generator(1)))
    assert emulate(spectral, train[:0], generator()).shape == (0, *train.shape[1:])


def test_a_pattern_of_one_size_is_put_onto_another():
    spectral = Spectral.fit(noisy(pictures(50), 0.06), pictures(50), generator())
    large = pictures(3, 96, 64)
    residual = emulate(spectral, large, generator()).float() - large.float()
    assert abs(float(residual.std()) / 255 - 0.06) < 0.01


def test_broken_and_constant_images_stay_finite():
    flat = torch.full((10, 16, 16, 3), 128, dtype=torch.uint8)
    spectral = Spectral.fit(flat, flat, generator())
    assert torch.equal(emulate(spectral, flat, generator()), flat)
    x = torch.full((2, 3, 16, 16), torch.nan)
    assert emulate(Spectral.fit(noisy(flat, 0.1), flat, generator()), x, generator()).isfinite().all()
    assert Spectral.fit(flat.permute(0, 3, 1, 2) / 255 * torch.nan, flat, generator()).gain.isfinite().all()


def streaked(images, seed=3):
    "Each image averaged over copies of itself, a step further to the right or down, by chance."
    shifted = [torch.stack([images.float().roll(i, axis) for i in range(-2, 3)]).mean(0) for axis in (1, 2)]
    right = torch.rand(len(images), 1, 1, 1, generator=generator(seed)) < 0.5
    return torch.where(right, shifted[1], shifted[0]).round().byte()


def test_blur_draws_a_line_for_every_image():
    train = noisy(pictures(400), 0.05)
    failing = streaked(noisy(pictures(400, seed=9), 0.05))
    blur = Blur.fit(failing, train, generator())
    assert blur.attenuation.directed
    steps = lambda images: torch.stack([(images.float().diff(dim=axis)).square().mean((1, 2, 3)) for axis in (1, 2)], 1)
    drawn = emulate(blur, train, generator())
    lopsided = lambda images: float((steps(images)[:, 0] / steps(images)[:, 1]).log().abs().mean())
    assert lopsided(drawn) > 0.6 * lopsided(failing) > 3 * lopsided(emulate(Spectral.fit(failing, train, generator()), train, generator()))
    assert abs(float(drawn.float().mean() - failing.float().mean())) < 6 and not torch.equal(drawn, emulate(blur, train, generator(1)))


def test_blur_keeps_to_itself_at_the_edges():
    "Left black, right white: what is blurred across the edge of the transform would make both gray."
    train, half = noisy(pictures(300), 0.05), torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    half[:, :, 16:] = 255
    blur = Blur.fit(streaked(train), train, generator())
    drawn = emulate(blur, half, generator())
    assert drawn[:, :, 0].float().mean() < 15 and drawn[:, :, -1].float().mean() > 240


def test_none_leaves_images_as_they_are():
    images = pictures(3)
    assert torch.equal(emulate(Unchanged.fit(images, images, generator()), images, generator()), images)


def test_style_takes_the_bands_of_a_failure():
    train, failing = pictures(40), noisy(pictures(30, seed=9), 0.1)
    style = Style.fit(failing, train, generator())
    detail = lambda images: float((images[:, :, 1:].float() - images[:, :, :-1].float()).std())
    assert abs(detail(emulate(style, train, generator())) / detail(failing) - 1) < 0.15 and detail(train) < 0.7 * detail(failing)
    assert not torch.equal(emulate(style, train, generator(0)), emulate(style, train, generator(1)))
    large = torch.zeros(900, 64, 64, 3, dtype=torch.uint8)
    assert len(Style.fit(large, large, generator()).examples) == 2**18 // (64 * 64 * 3)
    with pytest.raises(ArchrepairError, match="in the style of"):
        emulate(style, pictures(3, 24, 24), generator())


def with_a_corner(images):
    "A white corner, which is in one place and so beyond a spectrum."
    marked = images.clone()
    marked[:, :12, :12] = 255
    return marked


def test_a_painter_begins_with_what_was_drawn():
    x, drawn = torch.rand(2, 3, 20, 24, generator=generator()), torch.rand(2, 3, 20, 24, generator=generator(1))
    painter = Painter(3, generator())
    assert torch.equal(painter(x, drawn, generator()), drawn)
    assert torch.equal(painter.layers[0].weight, Painter(3, generator()).layers[0].weight)


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert float(energy_distance(x, y)) == 2 * (1 + 5 + 1 + 3) / 4 - 2  # mean distance of pairs, and of the two in x


def test_what_is_learned_comes_closer_than_its_start(monkeypatch):
    "Closer in the mean of the statistics of images, relative to how they scatter, on images that were not learned from."
    monkeypatch.setattr(module, "STEPS", 40)
    train, failing = noisy(pictures(200), 0.01), with_a_corner(noisy(pictures(200, seed=9), 0.01))
    spectral, learned = (kind.fit(failing[:100], train[:100], generator()) for kind in (Spectral, Learned))
    even = module._evenly(image_statistics(failing))
    apart = lambda emulator: float((even(image_statistics(emulate(emulator, train[100:], generator()))).mean(0)
                                    - even(image_statistics(failing[100:])).mean(0)).norm())
    assert apart(learned) < 0.7 * apart(spectral)
    again = Learned.fit(failing[:100], train[:100], generator())
    assert torch.equal(emulate(again, train, generator()), emulate(learned, train, generator())), "the same seed, the same emulator"


def test_learning_works_in_any_mode_and_on_large_images(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    train = pictures(20, 80, 96)
    with torch.inference_mode():
        learned = Learned.fit(noisy(train, 0.1), train, generator())
        assert emulate(learned, train, generator()).shape == train.shape
    seen = []
    Learned.fit(noisy(train, 0.1), train, generator(), lambda x: seen.append(x.shape[2:]) or x.mean((2, 3)))
    assert set(seen) == {(80, 96)}, "features of others are computed of whole images"


def test_a_function_of_the_users_own():
    images = pictures(4)
    darker = Custom(lambda x, generator: x / 2).fit(images, images, generator())
    assert (emulate(darker, images, generator()).float() - images.float() / 2).abs().max() <= 0.5
    assert "lambda" in darker.to_dict()["function"]
    with pytest.raises(ArchrepairError, match="emulated by a function of the user's own"):
        Custom.from_dict(darker.to_dict())
    for wrong, shape in ((lambda x, g: x[:1], "(1, 3, 32, 32)"), (lambda x, g: None, "NoneType")):
        with pytest.raises(ArchrepairError, match="the emulator returned") as error:
            emulate(Custom(wrong), images, generator())
        assert shape in str(error.value)


@pytest.mark.parametrize("name", EMULATORS)
def test_every_emulator_has_its_name_and_can_be_written_down(name, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    kind, train = EMULATORS[name].load(), pictures(30)
    assert kind.name == name
    emulator = kind.fit(noisy(train, 0.1), train, generator())
    again = kind.from_dict(json.loads(json.dumps(emulator.to_dict())))
    assert torch.equal(emulate(emulator, train, generator()), emulate(again, train, generator()))


def test_mistakes():
    with pytest.raises(ArchrepairError, match="1 images to measure; expected at least two"):
        Profile.of(pictures(1))
    with pytest.raises(ArchrepairError, match="failures have 1 channels and training images 3"):
        Spectral.fit(pictures(4, channels=1), pictures(4), generator())
    spectral = Spectral.fit(pictures(4), pictures(4), generator())
    with pytest.raises(ArchrepairError, match="images of 1 channels for a pattern of 3"):
        emulate(spectral, pictures(4, channels=1), generator())
    with pytest.raises(ArchrepairError, match="expected uint8 N×H×W×C"):
        emulate(spectral, torch.zeros(2, 32, 32), generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_does_not_matter():
    train = pictures(20)
    spectral = Spectral.fit(noisy(train, 0.1).cuda(), train.cuda(), generator())
    on_gpu = emulate(spectral, train.cuda(), generator())
    assert on_gpu.is_cuda and (on_gpu.cpu().int() - emulate(spectral, train, generator()).int()).abs().max() <= 1
