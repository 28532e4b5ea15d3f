"""Random pixels, a small set of them, and the same on the disk: as a tree of image files and as an npz file."""
from pathlib import Path

import numpy as np
from PIL import Image

from archrepair.data.images import ImageSet


def pixels(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def tiny(n: int = 6, **changes) -> ImageSet:
    return ImageSet(**{"images": pixels(n), "labels": np.arange(n) % 2, "classes": ("cat", "dog"), "name": "tiny"} | changes)


def save_tree(folder: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    "Write `counts` images per class into `folder`/<class>/, and return the folder."
    for c, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(pixels(1, 80, seed=100 * c + i)[0][:size[1], :size[0]]).convert(mode).save(folder / name / f"{i:03}.png")
    return folder


def write_npz(path: Path, **changes) -> Path:
    "Write twenty images of two classes, with other arrays in place of these or (None) without them, and return the path."
    np.savez(path, **{k: v for k, v in ({"images": pixels(20), "labels": np.arange(20) % 2} | changes).items() if v is not None})
    return path
