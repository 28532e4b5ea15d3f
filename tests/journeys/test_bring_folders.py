"""Folders of images as they lie on people's disks."""
import json
import os
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archrepair import load_dataset, original, predict
from archrepair.core.errors import Notice
from archrepair.experiments.originals import weights_of
from support.bring import Kind, ordinary, photos, picture
from support.finished import command, fails

FOLDERS = Kind("Folders of images", "`--dataset folder:PATH`, or `load_dataset(\"folder:PATH\")`: PATH holds a folder per class, or train "
                                    "and test (or val) with a folder per class in each.")


def flat(level: float, kind: type = np.uint8) -> Image.Image:
    "A gray picture of 32 px."
    return Image.fromarray(np.full((32, 32), level, kind))


def counts(images) -> dict[str, int]:
    return dict(zip(images.classes, torch.bincount(images.labels, minlength=len(images.classes)).tolist()))


def save_all(pictures: dict[str, Image.Image], **options) -> None:
    for path, image in pictures.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)


# --- pixels


@FOLDERS.works("16-bit PNG files", "scaled from 0…65535 to 0…255, and said")
def test_sixteen_bits(here):
    ramp = Image.fromarray(np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16))
    save_all({f"p/{name}/{i}.png": image for name, image in (("a", ramp), ("b", flat(9000, np.uint16))) for i in range(6)})
    with pytest.warns(Notice, match="12 images of 16 bits, scaled from 0…65535 to 0…255"):
        images = load_dataset("folder:p").images
    assert len(images[0].unique()) == 256 and (images[0] == 255).float().mean() < 0.01 and images[-1].unique().tolist() == [35]


@FOLDERS.works("16-bit TIFF files, big-endian ones too", "scaled in the same way")
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_tiff(here, mode):
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype("<u2" if mode == "I;16" else ">u2")
    save_all({f"p/a/{i}.tif": Image.frombytes(mode, (32, 32), ramp.tobytes()) for i in range(6)})
    image = load_dataset("folder:p").images[0]
    assert image[..., 0].flatten().tolist() == np.round(ramp.flatten() / 257).astype(int).tolist()


@FOLDERS.works("16-bit TIFF files in which 0 is white, as of X-rays", "turned: bright is bright, as Pillow does it for 8 bits")
def test_negatives(here):
    levels = np.full((32, 32), 9000, "<u2")
    values = {256: 32, 257: 32, 258: 16, 259: 1, 262: 0, 273: 8, 277: 1, 278: 32, 279: levels.nbytes}  # 262: the meaning of 0
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    Path("p/a").mkdir(parents=True)
    for i in range(5):
        head = struct.pack("<2sHI", b"II", 42, 8 + levels.nbytes)
        Path(f"p/a/{i}.tif").write_bytes(head + levels.tobytes() + struct.pack("<H", len(values)) + tags + bytes(4))
    assert load_dataset("folder:p").images.unique().tolist() == [255 - 35]


@FOLDERS.works("TIFF files of floats or 32-bit integers", "scaled by the range of the whole dataset, which is said")
def test_floats(here):
    grays = {"dark": -1000, "bright": 1000, "gray": 0}
    save_all({f"p/{name}/{i}.tif": flat(level, np.float32) for name, level in grays.items() for i in range(5)})
    with pytest.warns(Notice, match="15 images of 32 bits, scaled from -1000…1000 to 0…255"):
        images = load_dataset("folder:p")
    levels = {images.classes[y]: int(image[0, 0, 0]) for y, image in zip(images.labels, images.images)}
    assert levels == {"bright": 255, "dark": 0, "gray": 128}


@FOLDERS.works("photographs that only their EXIF tag turns", "upright")
def test_orientation(here):
    upright, turned = picture(ordinary().images[0]), Image.Exif()
    turned[0x0112] = 6
    save_all({f"p/a/{i}.png": upright.transpose(Image.Transpose.ROTATE_90) for i in range(6)}, exif=turned)
    assert np.array_equal(load_dataset("folder:p").images[0].numpy(), np.array(upright))


@FOLDERS.works("a picture 20,000 px wide and 1 px high", "its middle is taken, in little memory")
def test_a_line(here):
    line = Image.new("RGB", (20_000, 1), (10, 10, 10))
    line.paste((200, 200, 200), (9_000, 0, 11_000, 1))
    save_all({f"p/a/{i}.png": line for i in range(5)})
    assert load_dataset("folder:p", image_size=64).images.unique().tolist() == [200]


# --- files


@FOLDERS.works("hidden files, such as `._0001.png` that a Mac leaves", "left out, and counted")
def test_hidden_files(here):
    photos(here / "p")
    for path in list(Path("p/train/cat").glob("*.png"))[:2]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    with pytest.warns(Notice, match="files left out: 2 hidden"):
        assert counts(load_dataset("folder:p")) == {"cat": 24, "dog": 24, "owl": 24}


@FOLDERS.works("hidden folders, such as `.ipynb_checkpoints` and `__MACOSX`", "left out: no picture counts twice, no class is made of them")
def test_hidden_folders(here):
    photos(here / "p")
    for copies in ("p/train/cat/.ipynb_checkpoints", "p/train/__MACOSX"):
        shutil.copytree("p/train/cat", copies)
    assert counts(load_dataset("folder:p")) == {"cat": 24, "dog": 24, "owl": 24}


@FOLDERS.works("`.jfif`, `.gif` and `.avif` files, and whatever else Pillow opens", "read")
def test_formats(here):
    photos(here / "p")
    for i, suffix in enumerate(("jfif", "gif", "avif") * 4):
        save_all({f"p/train/emu/{i}.{suffix}": flat(90)}, **({"format": "JPEG"} if suffix == "jfif" else {}))
    images = load_dataset("folder:p")
    assert counts(images) == {"cat": 24, "dog": 24, "emu": 12, "owl": 24}
    assert abs(images.images[images.labels == 2].int() - 90).max() <= 3


@FOLDERS.one_line("only files that Pillow does not read, such as `.heic`", "counts them by kind, and says what is expected")
def test_only_other_formats(here, capsys):
    for name in ("cat", "dog"):
        Path("p", name).mkdir(parents=True)
        Path("p", name, "0.heic").write_bytes(b"x")
    assert "no images under p (files left out: 2 .heic); expected p/<class>/<image>" in fails(capsys, "evaluate", "--dataset", "folder:p")


@FOLDERS.one_line("a file that is no image, or half of one", "names the file")
def test_a_broken_file(here, capsys):
    path = photos(here / "p") / "train" / "dog" / "0000.png"
    path.write_bytes(picture(ordinary().images[0]).tobytes()[:100])
    assert f"cannot decode {path}" in fails(capsys, "evaluate", "--dataset", f"folder:{here}/p")


@FOLDERS.works("names of files and folders that are not UTF-8", "read; what cannot be shown becomes �")
def test_names_of_other_encodings(here, evaluate):
    photos(here / "p")
    for split in ("train", "test"):
        os.rename(f"p/{split}/cat", os.fsencode(f"p/{split}/k") + b"\xe4tzchen")
    assert load_dataset("folder:p").classes == ("dog", "k\N{REPLACEMENT CHARACTER}tzchen", "owl")
    assert evaluate("--dataset", "folder:p").n == 24


@FOLDERS.works("names with accents that a Mac wrote, beside the same from elsewhere", "the same class")
def test_accents(here):
    photos(here / "p")
    for split, form in (("train", "NFC"), ("test", "NFD")):
        os.rename(f"p/{split}/cat", f"p/{split}/" + unicodedata.normalize(form, "k\xe4tzchen"))
    assert counts(load_dataset("folder:p", "test")) == {"dog": 8, "k\xe4tzchen": 8, "owl": 8}


@FOLDERS.works("folders and files that are links", "followed")
def test_links(here):
    photos(here / "elsewhere")
    Path("p").mkdir()
    for split in ("train", "test"):
        Path("p", split).symlink_to(here / "elsewhere" / split)
    assert counts(load_dataset("folder:p", "test")) == {"cat": 8, "dog": 8, "owl": 8}


# --- classes


@FOLDERS.works("a test folder that lacks a class", "classes are matched by name: the accuracy is that of the images there are; it is said")
def test_a_class_without_test_images(here, evaluate):
    dataset = f"folder:{photos(here / 'p', train=60, test=20)}"
    trained, test = original("resnet18", dataset, "smoke"), load_dataset(dataset, "test")
    correct = predict(trained.network, test, trained.transform).argmax(1) == test.labels
    before = evaluate("--dataset", dataset)
    assert before.accuracy == pytest.approx(100 * correct.float().mean().item(), abs=0.01)
    shutil.rmtree("p/test/cat")
    after = evaluate("--dataset", dataset)
    assert after.accuracy == pytest.approx(100 * correct[test.labels > 0].float().mean().item(), abs=0.01)
    assert (before.n, after.n) == (60, 40) and "no test images of cat" in after.said


@FOLDERS.works("an empty class folder", "a class without images, which is said; a repair goes through")
def test_an_empty_class(here, capsys):
    Path(photos(here / "p"), "train", "zebra").mkdir()
    assert command("repair", "--dataset", "folder:p", "--tier", "smoke", "--out", "r", "--search-epochs", 1, "--finetune-epochs", 1) == 0
    assert "no train images of zebra" in capsys.readouterr().err
    assert counts(load_dataset("folder:p")) == {"cat": 24, "dog": 24, "owl": 24, "zebra": 0}
    assert json.loads(Path("r/record.json").read_text())["metrics"]["after"]["held_out"]["n"] == 12


@FOLDERS.one_line("one class alone", "names it, and asks for two or more")
def test_one_class(here, capsys):
    photos(here / "p")
    for name in ("dog", "owl"):
        for split in ("train", "test"):
            shutil.rmtree(f"p/{split}/{name}")
    message = fails(capsys, "repair", "--dataset", "folder:p", "--tier", "smoke", "--out", "r")
    assert message == "folder:p has training images of one class (cat); expected two or more to tell apart" and not Path("r").exists()


@FOLDERS.one_line("a class that only the test images have", "names it, and the classes that there are")
def test_a_strange_class(here, capsys):
    photos(here / "p")
    os.rename("p/test/owl", "p/test/owls")
    message = fails(capsys, "evaluate", "--dataset", "folder:p", "--tier", "smoke")
    assert "p/test has images of owls, not among those of p/train (cat, dog, owl)" in message


@FOLDERS.one_line("splits of other names, such as `Training` and `Validation`", "asks for train and test: they are not taken for classes")
def test_other_splits(here, capsys):
    photos(here / "p")
    os.rename("p/train", "p/Training"), os.rename("p/test", "p/Validation")
    assert "look like splits and not like classes; expected train and test" in fails(capsys, "evaluate", "--dataset", "folder:p")


@FOLDERS.one_line("fewer than five images, not divided into train and test", "says that none could be kept for testing")
def test_too_few(here, capsys):
    save_all({f"p/{name}/0.png": flat(9) for name in ("a", "b")})
    assert "folder:p has 2 images, too few to keep a fifth" in fails(capsys, "evaluate", "--dataset", "folder:p", "--tier", "smoke")


# --- size and place


@FOLDERS.works("photographs of 300 px with a thumbnail of 20 px before them",
               "the size is that of most images, the same for train and test; it is said")
def test_a_thumbnail(here):
    photos(here / "p", size=300)
    picture(ordinary().images[0], 20).save("p/train/cat/0000_thumb.png")
    with pytest.warns(Notice, match=r"97 of 97 images are resized to 224×224 px \(the commonest size is 300×300\)"):
        assert [load_dataset("folder:p", split).sides for split in ("train", "test")] == [(224, 224)] * 2


@FOLDERS.works("training images of 32 px and test images of 300 px", "judged at the size the network was trained at, 32 px")
def test_two_sizes(here, evaluate):
    photos(here / "p", train=60, test=20)
    for path in Path("p/test").rglob("*.png"):
        image = Image.open(path)
        image.resize((300, 300)).save(path)
    trained, test = original("resnet18", "folder:p", "smoke"), load_dataset("folder:p", "test", image_size=32)
    correct = predict(trained.network, test, trained.transform).argmax(1) == test.labels
    assert load_dataset("folder:p", "test").sides == load_dataset("folder:p", "train").sides == (32, 32)
    assert evaluate("--dataset", "folder:p").accuracy == pytest.approx(100 * correct.float().mean().item(), abs=0.01)


@FOLDERS.works("`folder:~/photos`, where no shell expands the tilde", "the home folder")
def test_tilde(here, evaluate, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    photos(here / "photos")
    assert evaluate("--dataset", "folder:~/photos").accuracy == evaluate("--dataset", f"folder:{here}/photos").accuracy


@FOLDERS.works("two folders `photos` in two places", "two datasets: each has its own trained network, known by the content of the images")
def test_one_name_twice(here, evaluate, monkeypatch):
    for place in ("here", "there"):
        photos(here / place / "photos")
    for split in ("train", "test"):
        os.rename(here / "there" / "photos" / split / "cat", here / "there" / "photos" / split / "zebra")
    networks = []
    for place in ("here", "there"):
        monkeypatch.chdir(here / place)
        assert evaluate("--dataset", "folder:photos").n == 24
        networks.append(weights_of("resnet18", f"folder:{here}/{place}/photos", "smoke", 0))
    assert networks[0] != networks[1] and all(path.exists() for path in networks)


@FOLDERS.works("commas, colons and blanks in the name of a folder", "part of the name")
@pytest.mark.parametrize("name", ["a, b", "12:30:5", "my photos #1"])
def test_names(here, evaluate, name):
    photos(here / name)
    assert evaluate("--dataset", f"folder:{name}").n == 24


@FOLDERS.one_line("the home of somebody who does not exist, or a name too long for any file", "says why it cannot be a path")
@pytest.mark.parametrize("path", ["~nobody-of-this-name/photos", "a" * 400])
def test_nowhere(here, capsys, path):
    message = fails(capsys, "evaluate", "--dataset", f"folder:{path}")
    assert message.startswith(f"'{path[:100]}") and "cannot be a path: " in message and "expected that of a file or a folder" in message
