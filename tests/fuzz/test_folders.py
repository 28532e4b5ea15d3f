"""Folders of images: any names, any files, links and pipes, and images that are larger than they look."""

import functools
import io
import os
import struct
import zlib

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from archrepair.data.datasets import fingerprint, load_dataset
from archrepair.data.failures import load_failures
from archrepair.experiments.originals import slug
from support.fuzz import attempt, broken, damage, filename, fuzz, ground

KIND = "folders"


@functools.cache
def picture(mode: str = "RGB", form: str = "png", width: int = 9, height: int = 8, turned: bool = False) -> bytes:
    "An image file, with a note that says it is to be turned."
    file, fill = io.BytesIO(), np.random.default_rng(0)
    if mode == "F":
        image = Image.fromarray(fill.normal(size=(height, width)).astype(np.float32))
    elif mode == "nan":
        image = Image.fromarray(np.full((height, width), np.nan, np.float32))
    elif mode in ("I", "I;16"):
        image = Image.fromarray(fill.integers(0, 60_000, (height, width)).astype(np.int32 if mode == "I" else np.uint16))
    else:
        image = Image.new(mode, (width, height), 1)
    notes = Image.Exif()
    notes[0x0112] = 6  # the telephone was turned
    image.save(file, form, **({"exif": notes} if turned else {}))
    return file.getvalue()


def declared(width: int, height: int, depth: int = 8, color: int = 2, rows: int = 0) -> bytes:
    "A PNG whose header says this size; `rows` of zeros follow it."
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    line = bytes(1 + width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1) * max(depth, 8) // 8)
    packer = zlib.compressobj(1)
    body = b"".join([*(packer.compress(line) for _ in range(rows)), packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


@functools.cache
def large(side: int = 9400, mode: str = "L") -> bytes:
    "Many pixels of one color, in a small file."
    return declared(side, side, 16 if mode == "I;16" else 8, {"L": 0, "RGB": 2, "RGBA": 6, "I;16": 0}[mode], side)


CONTENTS = [
    lambda: picture(),
    lambda: picture(),
    lambda: picture(),
    lambda: picture(width=8),
    lambda: picture("L"),
    lambda: picture("1"),
    lambda: picture("P", "gif"),
    lambda: picture("LA"),
    lambda: picture("RGBA", "webp"),
    lambda: picture("CMYK", "jpeg"),
    lambda: picture("F", "tiff"),
    lambda: picture("nan", "tiff"),
    lambda: picture("I", "tiff"),
    lambda: picture("I;16"),
    lambda: picture("RGB", "jpeg", turned=True),
    lambda: picture("RGB", "tiff", turned=True),
    lambda: picture("RGB", "ico", 16, 16),
    lambda: picture("RGB", "bmp"),
    lambda: picture("RGB", "ppm"),
    lambda: picture("RGB", "png", 1, 1),
    lambda: picture("L", "png", 4000, 1),
    lambda: picture("L", "png", 1, 30_000),
    lambda: picture("RGB", "png", 300, 5),
    lambda: declared(0, 0),
    lambda: declared(2**31 - 1, 1),
    lambda: declared(60_000, 60_000),
    lambda: declared(13_000, 13_000),
    lambda: declared(20_000, 4000, 16, 0),
    lambda: declared(8, 8, 3),
    lambda: declared(8, 8, 8, 9),
    lambda: b"",
    lambda: b"text",
    lambda: b"<svg><script/></svg>",
    lambda: b"P6 99999999 99999999 255 ",
    lambda: b"P5\n8 8\n70000\n",
    lambda: b"P5 8 8 0\n" + bytes(64),
    lambda: b"BM" + bytes(60),
    lambda: b"GIF89a" + b"\xff" * 40,
    lambda: b"II*\0" + b"\xff" * 60,
    lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(30),
    lambda: b"\xff\xd8\xff\xe0" + bytes(40),
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
]
suffixes = st.sampled_from(
    [".png"] * 6
    + [
        ".jpg",
        ".JPEG",
        ".tif",
        ".tiff",
        ".gif",
        ".webp",
        ".bmp",
        ".eps",
        ".ico",
        ".pgm",
        ".fli",
        ".icns",
        ".wmf",
        ".txt",
        "",
        ".png.exe",
        "..",
    ]
)
kinds = st.sampled_from(["file"] * 12 + ["loop", "up", "dangling", "folder", "pipe", "link", "outside"])
entries = st.tuples(
    st.one_of(st.sampled_from(["a", "b", "c", ".hidden", "._a", "a" * 200]), filename), suffixes, kinds, st.sampled_from(CONTENTS), broken
)
places = st.one_of(
    st.sampled_from(
        [
            "cat",
            "dog",
            "cat",
            "dog",
            "train/cat",
            "train/dog",
            "test/cat",
            "val/dog",
            "test/fox",
            ".git",
            "__MACOSX",
            "cat/deep/deeper",
            "",
            "train",
            "a.png",
        ]
    ),
    filename,
)
PLAIN = [(place, (name, ".png", "file", CONTENTS[0], ("whole", 0.0, 1))) for place in ("cat", "dog") for name in "xy"]
trees = st.one_of(
    st.lists(st.tuples(places, entries), max_size=7),
    st.lists(st.tuples(places, entries), max_size=2).map(lambda more: PLAIN + more),  # sound but for these
)


def put(folder, place: str, entry: tuple) -> None:
    "Make one entry of the tree; where one of that name is already, it stays."
    name, suffix, kind, make, how = entry
    path = folder / place / f"{name}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file" and not path.exists():
            path.write_bytes(damage(make(), how))
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "file":
            path.symlink_to(
                {
                    "loop": path.name,
                    "up": "../..",
                    "dangling": "nowhere",
                    "link": folder / "cat",
                    "outside": folder.parent.parent / "elsewhere",
                }[kind]
            )
    except (OSError, ValueError):  # a name that this file system does not take
        pass


def use(folder, split: str, version: str) -> None:
    "Read it as a dataset and as a folder of failures, and name what would be made of it."
    name = f"folder:{folder}{version}"
    images = load_dataset(name, split)
    pixels = images.batch(torch.arange(len(images)))
    assert pixels.dtype == torch.uint8 and pixels.shape == (len(images), images.size, images.size, 3)
    assert fingerprint(name, split) and "/" not in slug(name)
    load_failures(folder, images)


def one(make, name: str = "a.png", n: int = 2) -> list:
    "A tree of two classes, of which the first has this file."
    plain = ("whole", 0.0, 1)
    return [("cat", (name, "", "file", make, plain)), *[("dog", (f"{i}.png", "", "file", CONTENTS[0], plain)) for i in range(n)]]


@given(
    trees,
    st.sampled_from(["train", "test"]),
    st.sampled_from(["", "", "", ":fog:3", ":jpeg_compression:5", "/cat", "/", ":x", "/../photos"]),
)
@example(one(lambda: declared(13_000, 13_000)), "train", "")
@example(one(large), "train", "")
@example(one(lambda: large(9000, "RGB")), "train", "")
@example(one(lambda: large(9000, "I;16")), "train", "")
@example(one(lambda: large(13_000, "L")), "train", "")
@example(one(lambda: picture("L", "png", 1, 30_000)), "train", "")
@example(one(lambda: picture("nan", "tiff"), "a.tif"), "train", "")
@example([("cat", ("a", ".png", "pipe", CONTENTS[0], ("whole", 0.0, 1))), *one(CONTENTS[0])], "train", "")
@example([("cat", ("a", ".png", "up", CONTENTS[0], ("whole", 0.0, 1))), *one(CONTENTS[0])], "train", "")
@example([("c\udcfft", ("a", ".png", "file", CONTENTS[0], ("whole", 0.0, 1))), *one(CONTENTS[0])], "train", "")
@fuzz(KIND)
def test_folders(tree, split, version):
    with ground() as folder:
        (folder / "photos").mkdir()
        for place, entry in tree:
            put(folder / "photos", place, entry)
        attempt(KIND, lambda: use(folder / "photos", split, version), folder)
