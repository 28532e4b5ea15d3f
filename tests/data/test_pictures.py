"""One file becomes the right pixels, whatever wrote it; what of a folder is images, and which size they have."""
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from archrepair.core.errors import ArchrepairError
from archrepair.data.pictures import image_files, read_picture, span_of, survey
from support.pictures import pixels, save_tree

RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)


def _save(path, array, mode=None):
    "Write an array as an image; `mode` for those that numpy does not tell apart."
    image = Image.fromarray(array) if mode is None else Image.frombytes(mode, array.shape[::-1], array.tobytes())
    image.save(path)
    return path


@pytest.mark.parametrize(("suffix", "array", "mode", "gray"), [
    ("png", RAMP.astype(np.uint16), None, RAMP / 257), ("tif", RAMP.astype("<u2"), None, RAMP / 257),
    ("tif", RAMP.astype(">u2"), "I;16B", RAMP / 257), ("png", np.full((4, 4), 9000, np.uint16), None, np.full((4, 4), 35)),
    ("tif", (RAMP / 65535).astype(np.float32), None, RAMP / 257), ("tif", (RAMP / 257).astype(np.float32), None, RAMP / 257),
    ("tif", RAMP.astype(np.float32), None, RAMP / 257), ("tif", (RAMP / 65.535 - 500).astype(np.float32), None, RAMP / 257),
    ("tif", RAMP.astype(np.int32), None, RAMP / 257), ("tif", (RAMP * 10).astype(np.int32), None, RAMP / 257),
], ids=["16-bit PNG", "16-bit TIFF", "big-endian TIFF", "dark 16-bit PNG", "float to 1", "float to 255", "float to 65535", "float below 0",
        "32-bit to 65535", "32-bit"])
def test_deep_pixels_are_scaled_not_cut_off(tmp_path, suffix, array, mode, gray):
    levels = np.array(read_picture(_save(tmp_path / f"x.{suffix}", array, mode))).astype(float)
    assert levels.shape == (*gray.shape, 3) and np.abs(levels - gray[..., None]).max() <= 1


def test_floats_of_a_dataset_share_one_scale(tmp_path):
    for i, high in enumerate((100.0, 1000.0)):
        _save(tmp_path / f"{i}.tif", np.array([[-1000.0, high]], np.float32))
    span = survey([tmp_path / "0.tif"], [tmp_path / "1.tif"]).span
    assert span == (-1000, 1000)
    assert np.array(read_picture(tmp_path / "0.tif", span))[0, :, 0].tolist() == [0, 140]
    with pytest.raises(ArchrepairError, match="pixels run from -1000 to 1000 but those of the dataset from 0 to 1; expected one range"):
        read_picture(tmp_path / "1.tif", (0.0, 1.0))


@pytest.mark.parametrize(("ranges", "span"), [
    ([(0, 0.5)], (0, 1)), ([(0, 1), (0, 2)], (0, 255)), ([(3, 4000)], (0, 65535)), ([(-1, 1)], (-1, 1)), ([(0, 1e6)], (0, 1e6)),
])
def test_the_range_of_pixels_without_one(ranges, span):
    assert span_of(ranges) == span


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    _save(tmp_path / "x.tif", np.array([[np.nan, 1.0]], np.float32))
    with pytest.raises(ArchrepairError, match="x.tif has pixels that are not finite"):
        survey([tmp_path / "x.tif"])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_are_upright(tmp_path, orientation, suffix):
    turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    upright = Image.fromarray(pixels(1, 20)[0][:12])
    as_stored = upright.transpose(turn[orientation]) if orientation in turn else upright
    if suffix == "tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        as_stored.save(tmp_path / "x.tif", tiffinfo=tags)
    else:
        tags = Image.Exif()
        tags[0x0112] = orientation
        as_stored.save(tmp_path / "x.png", exif=tags)
    assert np.array_equal(np.array(read_picture(tmp_path / f"x.{suffix}")), np.array(upright))
    assert survey([tmp_path / f"x.{suffix}"]).sides == {(20, 12): 1}


@pytest.mark.parametrize(("suffix", "kind"), [("gif", None), ("png", "PNG"), ("webp", None)])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix, kind):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (40, 200)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", kind, save_all=True, append_images=frames[1:], **options)
    assert np.array(read_picture(tmp_path / f"x.{suffix}")).max() == 40


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", ".gif", ".avif", ".webp", ".tga", ".ico", ".jp2", ".pcx", ".sgi", ".pgm"])
def test_every_format_that_pillow_reads_is_an_image(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM"}.get(suffix)
    Image.new("L" if suffix == ".pgm" else "RGB", (16, 16), 128 if suffix == ".pgm" else (128,) * 3).save(path, kind)
    assert image_files(tmp_path) == [path]
    assert abs(np.array(read_picture(path)).astype(int) - 128).max() <= 2


def test_what_is_no_image_of_the_users_is_left_out_and_counted(tmp_path):
    save_tree(tmp_path, {"cat": 2, "__MACOSX": 2, "cat/.ipynb_checkpoints": 1})
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "notes.txt", "scan.pdf", "readme"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7")
    left_out = Counter()
    assert [path.name for path in image_files(tmp_path, left_out)] == ["000.png", "001.png"]
    assert left_out == {"hidden": 5, ".txt": 1, ".pdf": 1, "no suffix": 1}


def test_links_are_followed_but_not_in_circles(tmp_path):
    save_tree(tmp_path / "elsewhere", {"deep": 2})
    (tmp_path / "cat").mkdir()
    os.symlink(tmp_path / "elsewhere" / "deep", tmp_path / "cat" / "more")
    os.symlink(tmp_path / "cat", tmp_path / "cat" / "self")
    os.symlink(tmp_path / "elsewhere" / "deep" / "000.png", tmp_path / "cat" / "one.png")
    names = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path / "cat")]
    assert names == ["cat/more/000.png", "cat/more/001.png", "cat/one.png"]


@pytest.mark.parametrize(("sides", "size"), [
    ([(20, 20)] + 3 * [(300, 300)], 224), ([(300, 300)] + 3 * [(20, 20)], 20), (2 * [(28, 28)] + [(32, 32)], 28),
    ([(28, 28), (32, 32)], 32), (2 * [(20, 20)] + [(300, 200), (301, 200), (300, 202)], 224), ([(32, 24)], 224), ([(65, 65)], 224),
    ([(20, 20), (300, 300)], 224),
], ids=str)
def test_the_size_is_that_of_most_images(tmp_path, sides, size):
    for i, (width, height) in enumerate(sides):
        Image.new("L", (width, height)).save(tmp_path / f"{i}.png")
    assert survey(image_files(tmp_path)).image_size == size
