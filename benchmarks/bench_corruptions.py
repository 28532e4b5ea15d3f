"""Images per second of every corruption, one thread, beside a plain loop over images with the same maths.

    python benchmarks/bench_corruptions.py [--images 2000] [--size 32] [--full] [--out outputs/bench/corruptions.json]

Both sides get the same images, the same severities and, where they draw any, the same random numbers, and must agree before
they are timed; in the timing each draws its own. Times are CPU seconds of this process. `--full` also makes
the paper's 15 × 5 versions of a 10,000-image test set.
An installed imagecorruptions is timed too, where it runs (its constants are always those of 224 px).
"""
from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv  # noqa: E402
from measure import Ratio  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import ndimage  # noqa: E402

from archrepair.core.errors import ArchrepairError, write_atomic  # noqa: E402
from archrepair.corruptions.catalogue import COMMON_CORRUPTIONS, PAPER_CORRUPTIONS, PARAMETERS, corrupt  # noqa: E402
from archrepair.corruptions.randomness import image_keys, random_integers, random_normal, random_uniform  # noqa: E402
from archrepair.corruptions.textures import frost_textures  # noqa: E402
from archrepair.data.datasets import load_dataset  # noqa: E402

quantize = lambda x: np.floor(np.clip(x + 2.0**-12, 0, 255)).astype(np.uint8)


def clipped_zoom(x: np.ndarray, z: float) -> np.ndarray:
    n, crop = len(x), math.ceil(len(x) / z)
    top = (n - crop) // 2
    x = ndimage.zoom(x[top : top + crop, top : top + crop], (z, z, 1), order=1)
    cut = (len(x) - n) // 2
    return x[cut : cut + n, cut : cut + n]


def motion(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    n, weights = len(x), np.exp(-np.arange(2 * radius + 1) ** 2 / (2 * sigma**2))
    out, lines = np.zeros(x.shape), np.arange(n)
    for i, w in enumerate(weights / weights.sum()):
        if w < 1e-6:
            break
        rows = np.clip(lines + math.ceil(i * math.sin(angle) - 0.5), 0, n - 1)
        columns = np.clip(lines + math.ceil(i * math.cos(angle) - 0.5), 0, n - 1)
        out += w * x[rows[:, None], columns]
    return np.floor(out + 0.5)


def clouds(n: int, decay: float, noise: np.ndarray) -> np.ndarray:
    grid, used, width = np.zeros((1, 1)), 0, 100.0
    while (k := len(grid)) < n:
        u = noise[used : used + 3 * k * k].reshape(3, k, k) * width**2
        right, down = np.roll(grid, -1, 1), np.roll(grid, -1, 0)
        center = (grid + right + down + np.roll(right, -1, 0)) / 4 + u[0]
        fine = np.empty((2 * k, 2 * k))
        fine[::2, ::2], fine[1::2, 1::2] = grid, center
        fine[::2, 1::2] = (grid + right + center + np.roll(center, 1, 0)) / 4 + u[1]
        fine[1::2, ::2] = (grid + down + center + np.roll(center, 1, 1)) / 4 + u[2]
        grid, used, width = fine, used + 3 * k * k, width / decay
    grid = grid - grid.min()
    return (grid / grid.max())[:n, :n, None]


def one(name: str, image: np.ndarray, p, draws: dict[str, np.ndarray]) -> np.ndarray:
    "One image n×n×3 by numpy, scipy and Pillow; `draws` are its random numbers."
    n, x = len(image), image.astype(float)
    if name == "gaussian_noise":
        return quantize(x + 255 * p * draws["normal"])
    if name == "shot_noise":
        return quantize(draws["generator"].poisson(x * p / 255) * (255 / p))
    if name == "impulse_noise":
        hit, white = draws["generator"].random(x.shape) < p, draws["generator"].random(x.shape) < 0.5
        return np.where(hit, np.where(white, 255, 0), image).astype(np.uint8)
    if name == "defocus_blur":
        radius, alias = p
        grid, reach = (np.arange(-8, 9), 1) if radius <= 8 else (np.arange(-radius, radius + 1), 2)
        disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
        taps = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * alias**2))
        kernel = ndimage.correlate(disk / disk.sum(), np.outer(taps, taps) / taps.sum() ** 2, mode="mirror")
        used = np.flatnonzero(kernel.max(0) > 1e-9)
        kernel = kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1]
        return quantize(np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1))
    if name == "gaussian_blur":
        return quantize(ndimage.gaussian_filter(x, (p, p, 0), mode="nearest", truncate=4))
    if name == "glass_blur":
        sigma, d, passes = p
        y = quantize(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4))
        for moves in draws["moves"][:passes]:
            for h in range(n - d, d, -1):
                for w in range(n - d, d, -1):
                    dy, dx = moves[:, h - d - 1, w - d - 1]
                    y[h, w] = y[h + dy, w + dx]
        return quantize(ndimage.gaussian_filter(y.astype(float), (sigma, sigma, 0), mode="nearest", truncate=4))
    if name == "motion_blur":
        return motion(x, *p, draws["angle"]).astype(np.uint8)
    if name == "zoom_blur":
        factors = np.arange(1, 1 + p[0] * (p[1] - 0.5), p[0])
        return quantize((x + sum(clipped_zoom(x, z) for z in factors)) / (len(factors) + 1))
    if name == "snow":
        mean, std, zoom, threshold, radius, sigma, mix = p
        flakes = clipped_zoom(mean + std * draws["field"], zoom) if zoom > 1 else mean + std * draws["field"]
        flakes = motion(quantize(np.where(flakes < threshold, 0, flakes) * 255).astype(float), radius, sigma, draws["angle"])
        gray = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
        return quantize(mix * x + (1 - mix) * np.maximum(x, 1.5 * gray + 127.5) + flakes + flakes[::-1, ::-1])
    if name == "frost":
        return quantize(p[0] * x + p[1] * draws["patch"])
    if name == "fog":
        top = x.max()
        return quantize((x + 255 * p[0] * clouds(n, p[1], draws["noise"])) * top / (top + 255 * p[0]))
    if name == "brightness":
        hsv = rgb_to_hsv(x / 255)
        hsv[..., 2] = np.clip(hsv[..., 2] + p, 0, 1)
        return quantize(hsv_to_rgb(hsv) * 255)
    if name == "contrast":
        mean = x.mean((0, 1))
        return quantize((x - mean) * p + mean)
    if name == "elastic_transform":
        alpha, sigma, jitter = p
        control = n // 2 + n // 3 * np.array([[1.0, 1], [1, -1], [-1, -1]])
        inverse = np.linalg.solve(np.c_[control + jitter * draws["jitter"], np.ones(3)], control)
        y, x_ = np.mgrid[:n, :n].astype(float)
        at = np.stack([x_, y, np.ones((n, n))], -1) @ inverse
        x = np.stack([ndimage.map_coordinates(x[..., c], [at[..., 1], at[..., 0]], order=1, mode="mirror") for c in range(3)], -1)
        if alpha:
            dx, dy = (alpha * ndimage.gaussian_filter(f, sigma, mode="reflect", truncate=3) for f in draws["fields"])
            x = np.stack([ndimage.map_coordinates(x[..., c], [y + dy, x_ + dx], order=1, mode="reflect") for c in range(3)], -1)
        return quantize(x)
    if name == "pixelate":
        side = int(n * p)
        return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BOX).resize((n, n), Image.Resampling.BOX))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=p)
    return np.array(Image.open(buffer))


def numbers(name: str, severity: int, count: int, n: int) -> list[dict]:
    "The random numbers that `corrupt` uses for images 0…count−1 (other ones of the same law for shot and impulse noise)."
    keys, p = image_keys(f"bench:{name}:{severity}", torch.arange(count)), PARAMETERS[name][n][severity - 1]
    signed = lambda k, size, stream=0: 2 * random_uniform(k, size, stream).double().numpy() - 1
    angle = lambda k, low, high, stream: math.radians(float(random_uniform(k, 1, stream).double()) * (high - low) + low)
    out = []
    for i in range(count):
        k = keys[i : i + 1]
        draw = {"generator": np.random.default_rng(i)}
        if name == "gaussian_noise":
            draw["normal"] = random_normal(k, 3 * n * n).view(n, n, 3).double().numpy()
        elif name == "glass_blur":
            m = n - 2 * p[1]
            draw["moves"] = [random_integers(k, 2 * m * m, -p[1], p[1], j).view(2, m, m).numpy() for j in range(p[2])]
        elif name == "motion_blur":
            draw["angle"] = angle(k, -45, 45, 0)
        elif name == "snow":
            draw |= {"field": random_normal(k, n * n).view(n, n, 1).double().numpy(), "angle": angle(k, -135, -45, 1)}
        elif name == "frost":
            texture = frost_textures(n)[int(random_integers(k, 1, 0, 5))].numpy()
            y, x = (int(u * (side - n)) for u, side in zip(random_uniform(k, 2, 1)[0].tolist(), texture.shape))
            draw["patch"] = texture[y : y + n, x : x + n].astype(float)
        elif name == "fog":
            draw["noise"] = signed(k, (1 << (n - 1).bit_length()) ** 2 - 1)[0]
        elif name == "elastic_transform":
            draw |= {"jitter": signed(k, 6).reshape(3, 2), "fields": signed(k, 2 * n * n, 1).reshape(2, n, n)}
        out.append(draw)
    return out


def fresh(name: str, rng: np.random.Generator, n: int, p) -> dict:
    "Random numbers of the same law, drawn by numpy for one image."
    if name == "gaussian_noise":
        return {"normal": rng.normal(size=(n, n, 3))}
    if name == "glass_blur":
        return {"moves": rng.integers(-p[1], p[1], (p[2], 2, n - 2 * p[1], n - 2 * p[1]))}
    if name == "motion_blur":
        return {"angle": math.radians(rng.uniform(-45, 45))}
    if name == "snow":
        return {"field": rng.normal(size=(n, n, 1)), "angle": math.radians(rng.uniform(-135, -45))}
    if name == "frost":
        texture = frost_textures(n)[rng.integers(5)].numpy()
        y, x = rng.integers(texture.shape[0] - n), rng.integers(texture.shape[1] - n)
        return {"patch": texture[y : y + n, x : x + n].astype(float)}
    if name == "fog":
        return {"noise": rng.uniform(-1, 1, (1 << (n - 1).bit_length()) ** 2 - 1)}
    if name == "elastic_transform":
        return {"jitter": rng.uniform(-1, 1, (3, 2)), "fields": rng.uniform(-1, 1, (2, n, n))}
    return {"generator": rng}


def timed(function) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compare(name: str, images: np.ndarray, plain: int) -> dict:
    "Images per second over severities 1, 3 and 5, and how far the two sides are apart."
    n, ours, theirs, apart, different = images.shape[1], 0.0, 0.0, 0, 0.0
    for severity in (1, 3, 5):
        corrupt(images[:64], name, severity, dataset="bench")
        seconds, fast = timed(lambda s=severity: corrupt(images, name, s, dataset="bench").numpy())
        ours += seconds / len(images)
        draws = numbers(name, severity, plain, n)
        p = PARAMETERS[name][n][severity - 1]
        slow = np.stack([one(name, x, p, d) for x, d in zip(images[:plain], draws)])
        rng = np.random.default_rng(severity)
        seconds, _ = timed(lambda p=p, rng=rng: [one(name, x, p, fresh(name, rng, n, p)) for x in images[:plain]])
        theirs += seconds / plain
        if name not in ("shot_noise", "impulse_noise"):
            gap = np.abs(fast[:plain].astype(int) - slow)
            apart, different = max(apart, int(gap.max())), max(different, float((gap > 0).mean()))
        else:  # same law, other numbers: the means must agree
            assert abs(float(fast[:plain].mean()) - float(slow.mean())) < 0.5, f"{name}: means differ"
    assert apart <= 1 and different < 0.02, f"{name}: {apart} gray levels apart, {different:.2%} of the values"
    return {"images_per_s": 3 / ours, "plain_per_s": 3 / theirs, "ratio": theirs / ours, "largest_difference": apart,
            "share_different": different}


def cases(rounds: int = 5):
    "The line of the table: the ratios of all kinds, each in three severities; the loop is the slow side, so it gets few images."
    images = load_dataset("digits", "test").images[:400].numpy()
    each = {name: compare(name, images, 4 * rounds)["ratio"] for name in COMMON_CORRUPTIONS}
    slowest = min(each, key=each.__getitem__)
    yield Ratio.of("corruptions", f"images per second over {len(each)} kinds; the lowest is {slowest}",
                   "a loop over images with the same mathematics", list(each.values()), goal=15.0)


def imagecorruptions_speed(name: str, images: np.ndarray) -> float | None:
    "Images per second of the imagecorruptions package, None where it is not installed or fails."
    try:
        from imagecorruptions import corrupt as theirs

        seconds, _ = timed(lambda: [theirs(x, corruption_name=name, severity=3) for x in images])
    except Exception:  # it fails in many ways: missing pkg_resources, removed numpy names, renamed arguments
        return None
    return len(images) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--plain", type=int, default=40, help="images for the plain loop")
    parser.add_argument("--size", type=int, default=32, choices=(32, 64, 224))
    parser.add_argument("--full", action="store_true", help="also make 15 × 5 × 10,000 images")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/corruptions.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        images, source = load_dataset("cifar10", "test", download=False).images, "cifar10"
    except ArchrepairError:
        images, source = load_dataset("digits", "test").images.repeat(17, 1, 1, 1)[:10_000], "digits"
    whole = images.numpy()
    if arguments.size > 32:
        source = f"{source} enlarged"
        large = torch.nn.functional.interpolate(images[: arguments.images].permute(0, 3, 1, 2).float(), size=arguments.size,
                                                mode="bicubic").clamp(0, 255)
        images = large.byte().permute(0, 2, 3, 1).contiguous()
    some = images[: arguments.images].numpy()
    result = {"images": len(some), "size": arguments.size, "source": source, "torch": torch.__version__, "threads": 1,
              "machine": platform.processor() or platform.machine(), "corruptions": {}}
    print(f"{'':18}{'images/s':>10}{'plain loop':>12}{'ratio':>8}{'apart':>7}{'share':>9}{'imagecorr.':>12}")
    for name in COMMON_CORRUPTIONS:
        row = compare(name, some, arguments.plain)
        row["imagecorruptions_per_s"] = other = imagecorruptions_speed(name, some[: arguments.plain])
        result["corruptions"][name] = row
        print(f"{name:18}{row['images_per_s']:10,.0f}{row['plain_per_s']:12,.0f}{row['ratio']:7.1f}×{row['largest_difference']:7d}"
              f"{row['share_different']:9.3%}{f'{other:,.0f}' if other else '–':>12}", flush=True)
    if arguments.full:
        seconds, _ = timed(lambda: [corrupt(whole, name, s, dataset="bench") for name in PAPER_CORRUPTIONS for s in range(1, 6)])
        result["full_cpu_seconds"] = seconds
        print(f"15 × 5 × {len(whole):,} images of 32 px: {seconds:.1f} CPU seconds")
        assert seconds < 120 or len(whole) != 10_000, "slower than promised"
    write_atomic(arguments.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
