"""The direction of a blur: what is measured of an image, and whether a line that is there is found, and none that is not."""
import json
import math

import numpy as np
import pytest
import torch
from support.textures import textured_pictures

from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.directions import BANDS, TURNS, Attenuation, directional_power, log_power
from archrepair.corruptions.statistics import frequencies


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, seed=0, size=32):
    return textured_pictures(count, size + 16, seed).byte().permute(0, 2, 3, 1)


def cropped(images):
    return images[:, 8:-8, 8:-8].float().round().byte()


def streaked(images, down, across, length=5):
    "Each image averaged over so many copies of itself, each one step further down and across."
    steps = range(-(length // 2), length // 2 + 1)
    return cropped(sum(images.float().roll((i * down, i * across), (1, 2)) for i in steps) / length)


CLEAN = directional_power(cropped(pictures(400)))


def test_log_power_of_one_image_in_numpy():
    image = cropped(pictures(1))
    gray, window = image[0].numpy().mean(2) / 255, np.outer(*[np.hanning(34)[1:-1]] * 2)
    faded = (gray - (gray * window).sum() / window.sum()) * window
    power = np.abs(np.fft.rfft2(faded)) ** 2 / (window**2).sum()
    assert np.allclose(log_power(image)[0], np.log(power + 1 / 36 / 255**2), atol=1e-9)
    assert torch.allclose(log_power(image), log_power(image.permute(0, 3, 1, 2).double() / 255))


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (33, 17), (8, 8), (4, 5)])
def test_any_size(size):
    images = pictures(5, size=64)[:, :size[0], :size[1]]
    rows = directional_power(images)
    assert rows.shape == (5, 5 * BANDS) and rows.isfinite().all()
    assert torch.allclose(directional_power(images[2:3]), rows[2:3])
    turned = directional_power(images.transpose(1, 2).flip(1)).view(5, BANDS, 5)
    assert torch.allclose(turned[..., 0], rows.view(5, BANDS, 5)[..., 0], atol=0.3 if min(size) < 8 else 0.05)


def test_mistakes():
    for wrong in (torch.zeros(2, 3, 20, 3), torch.zeros(3, 32, 32), torch.zeros(2, 3, 32, 3, dtype=torch.uint8)):
        with pytest.raises(ArchrepairError, match="expected uint8 N×H×W×C, or float N×C×H×W, of at least 4×4"):
            directional_power(wrong)


@pytest.mark.parametrize(("down", "across", "angle"), [(0, 1, 0), (1, 1, 45), (1, 0, 90), (1, -1, 135)])
def test_one_line_is_found_where_it_is(down, across, angle):
    found = Attenuation.between(CLEAN, directional_power(streaked(pictures(200, seed=1), down, across)))
    likeliest = 10 * int(found.shares.argmax())
    assert found.evidence > 200 and min((likeliest - angle) % 180, (angle - likeliest) % 180) <= 10
    assert found.describe() in {f"along a line at {a % 180} degrees" for a in range(angle - 5, angle + 6)}
    gain = found.gain(torch.tensor([math.radians(angle)], dtype=torch.float64), 32, 32)[0]
    along, beside = gain[8 * down, 8 * abs(across)] if across >= 0 else gain[-8, 8], gain[8 * abs(across), 8 * down]
    if angle in (0, 90):
        assert along < 0.5 * beside


def test_lines_of_many_angles_are_one_pattern():
    parts = [streaked(some, *line) for some, line in zip(pictures(300, seed=2).split(100), ((0, 1), (1, 0), (1, 1)))]
    found = Attenuation.between(CLEAN, directional_power(torch.cat(parts)))
    near = lambda angle: float(sum(found.shares[(angle // 10 + i) % TURNS] for i in (-1, 0, 1)))
    assert all(abs(near(angle) - 1 / 3) < 0.15 for angle in (0, 90, 45 // 10 * 10))
    assert found.describe() == "along a line, another one in each image"
    drawn = torch.rad2deg(found.angles(3000, generator())) % 180
    assert abs(float(((drawn > 75) & (drawn < 105)).double().mean()) - near(90)) < 0.1
    assert torch.equal(found.angles(9, generator()), found.angles(9, generator()))


@pytest.mark.parametrize("damage", [lambda x: x,
                                    lambda x: (x.float() + 20 * torch.randn(x.shape, generator=generator())).clamp(0, 255).byte(),
                                    lambda x: (128 + 0.4 * (x.float() - 128)).byte()])
def test_where_there_is_no_line_none_is_found(damage):
    found = Attenuation.between(CLEAN, directional_power(damage(cropped(pictures(200, seed=3)))))
    assert not found.directed and found.describe() == "" and (found.shares == 1 / TURNS).all() and (found.template[:, 1:] == 0).all()


def test_few_images_are_no_evidence_and_no_error():
    for ordinary, count in ((400, 1), (400, 2), (12, 10), (150, 60)):
        found = Attenuation.between(CLEAN[:ordinary], directional_power(cropped(pictures(count, seed=4))))
        assert not found.directed and found.template.isfinite().all()


def test_chance_is_not_taken_for_a_line():
    rows = torch.cat([CLEAN, directional_power(cropped(pictures(400, seed=5)))])
    for seed in range(20):
        order = torch.randperm(len(rows), generator=generator(seed))
        assert not Attenuation.between(rows[order[:200]], rows[order[200:230]]).directed


def test_the_same_gain_everywhere_is_a_loss_of_contrast():
    found = Attenuation.between(CLEAN, CLEAN + torch.tensor([2 * math.log(0.5), 0, 0, 0, 0]).repeat(BANDS))
    gain = found.gain(torch.zeros(1, dtype=torch.float64), 48, 32)
    assert gain.shape == (1, 48, 17) and torch.allclose(gain, torch.tensor(0.5), atol=1e-3)


def test_gains_follow_the_template_and_never_exceed_one():
    template = torch.zeros(BANDS, 3, dtype=torch.float64)
    template[:, 0], template[:, 1] = -1.0, -0.8
    found = Attenuation(template, torch.full((TURNS,), 1 / TURNS, dtype=torch.float64), 1.0)
    angles = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    gain, f = found.gain(angles, 40, 40), frequencies(40, 40)
    row = 12  # 0.3 cycles per pixel down, none across: a wave at 90 degrees
    for each, angle in zip(gain, angles.tolist()):
        assert math.isclose(float(each[row, 0]), math.exp(0.5 * (-1.0 - 0.8 * math.cos(2 * (math.pi / 2 - angle)))), rel_tol=1e-5)
    assert (Attenuation(-template, found.shares, 1.0).gain(angles, 40, 40) <= 1).all() and (gain[:, f > 0.7] > 0).all()


def test_record():
    found = Attenuation.between(CLEAN, directional_power(streaked(pictures(60, seed=1), 0, 1)))
    again = Attenuation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict() and again.describe() == found.describe()
