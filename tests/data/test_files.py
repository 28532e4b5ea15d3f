"""Files of one's own: npz files and folders of images, how they are divided and decoded, and how a broken one is named."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archrepair.core.errors import ArchrepairError, Notice
from archrepair.data import files
from archrepair.data.datasets import load_dataset
from archrepair.data.files import FolderImages, content_of
from archrepair.data.images import Normalize
from support.pictures import pixels, save_tree, write_npz

# --- npz


def test_a_single_npz_is_divided_once_and_for_all(tmp_path):
    path = write_npz(tmp_path / "a.npz", classes=np.array(["cat", "dog"]))
    train, test = (load_dataset(f"npz:{path}", s) for s in ("train", "test"))
    assert sorted([*train.index.tolist(), *test.index.tolist()]) == list(range(20)) and len(test) == 4
    assert test.labels.bincount().tolist() == [2, 2] and train.classes == ("cat", "dog")
    assert torch.equal(test.images, torch.from_numpy(pixels(20))[test.index])
    assert torch.equal(load_dataset(f"npz:{path}", "test").index, test.index)


def test_a_folder_of_npz_is_taken_as_it_is_and_classes_are_optional(tmp_path):
    write_npz(tmp_path / "train.npz"), write_npz(tmp_path / "test.npz", images=pixels(4, seed=1), labels=np.array([0, 1, 2, 0]))
    test = load_dataset(f"npz:{tmp_path}", "test")
    assert len(load_dataset(f"npz:{tmp_path}", "train")) == 20 and len(test) == 4 and test.classes == ("0", "1", "2")


def _broken(path, kind):
    if kind == "missing":
        return path
    if kind in ("empty", "text", "bad zip"):
        path.write_bytes({"empty": b"", "text": b"hello", "bad zip": b"PK\x03\x04junk"}[kind])
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "truncated":
        write_npz(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "damaged":
        np.savez_compressed(path, images=pixels(20), labels=np.zeros(20, int))
        data = bytearray(path.read_bytes())
        data[300:360] = b"\xff" * 60
        path.write_bytes(data)
    else:
        write_npz(path, **{
            "no images": {"images": None}, "no labels": {"labels": None}, "float images": {"images": pixels(20) / 255},
            "objects": {"classes": np.array([{"a": 1}, 2], object)}, "object labels": {"labels": np.array([0] * 20, object)},
            "gray": {"images": pixels(20)[..., 0]}, "range": {"classes": np.array(["one"])}, "lengths": {"labels": np.zeros(3, int)},
            "negative": {"labels": np.full(20, -1)}, "nothing": {"images": pixels(0), "labels": np.zeros(0)},
        }[kind])
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "bad zip", "npy", "truncated", "damaged", "no images", "no labels",
                                  "float images", "objects", "object labels", "gray", "range", "lengths", "negative", "nothing"])
def test_a_bad_npz_gives_one_line_that_names_it(tmp_path, kind):
    path = _broken(tmp_path / "a.npz", kind)
    with pytest.raises(ArchrepairError) as caught:
        load_dataset(f"npz:{path}", "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_of_python_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    np.savez(tmp_path / "a.npz", images=pixels(2), labels=np.zeros(2, int), classes=np.array([Bomb()], object))
    (tmp_path / "exploded").unlink(missing_ok=True)
    with pytest.raises(ArchrepairError):
        load_dataset(f"npz:{tmp_path}/a.npz")
    assert not (tmp_path / "exploded").exists()


# --- folders


def test_a_folder_of_classes_is_divided_fairly(tmp_path):
    save_tree(tmp_path, {"dog": 10, "cat": 15, "empty": 0, ".hidden": 2})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    train, test = (load_dataset(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog", "empty") and train.size == 8
    assert test.labels.bincount().tolist() == [3, 2] and train.labels.bincount().tolist() == [12, 8]
    assert not set(train.index.tolist()) & set(test.index.tolist())


def test_a_divided_folder_is_taken_as_it_is(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        save_tree(tmp_path / split, {"a": n, "b": 1})
    train, test = (load_dataset(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (4, 3) and test.classes == ("a", "b")
    assert torch.equal(train.images[0], torch.from_numpy(pixels(1, 80, seed=0)[0][:8, :8]))


def test_a_missing_split_is_not_made_up(tmp_path):
    save_tree(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(ArchrepairError, match="no test images"):
        load_dataset(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("valid",)])
def test_splits_of_another_name_are_not_taken_for_classes(tmp_path, names):
    save_tree(tmp_path, {f"{name}/{c}": 3 for name in names for c in ("a", "b")})
    with pytest.raises(ArchrepairError, match="look like splits and not like classes; expected train and test"):
        load_dataset(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize(("size", "asked", "expected"), [
    ((8, 8), None, 8), ((64, 64), None, 64), ((70, 70), None, 224), ((40, 30), None, 224), ((40, 30), 32, 32), ((8, 8), 16, 16),
    ((64, 20), 16, 16),
])
def test_image_sizes(tmp_path, size, asked, expected):
    images = load_dataset(f"folder:{save_tree(tmp_path, {'a': 5}, size)}", "train", image_size=asked)
    assert images.images.shape[1:] == (expected, expected, 3) and images.size == expected


def test_the_geometry_is_that_of_imagenet(tmp_path):
    "Short side to 256/224 of the size, then the center: torchvision's Resize and CenterCrop."
    from torchvision import transforms

    save_tree(tmp_path, {"a": 1}, (80, 40))
    file = tmp_path / "a" / "000.png"
    theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28)])(Image.open(file))
    assert torch.equal(FolderImages([file], 28)[torch.tensor([0])][0], torch.from_numpy(np.array(theirs)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_color_modes_become_rgb(tmp_path, mode):
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(1, 16)[0]).convert(mode).save(tmp_path / "a" / f"x.{suffix}")
    images = load_dataset(f"folder:{tmp_path}", "train").images
    assert images.shape == (1, 16, 16, 3)
    if mode == "L":
        assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()


@pytest.mark.parametrize("kind", ["text", "truncated", "empty"])
@pytest.mark.parametrize("image_size", [None, 32])
def test_a_broken_image_is_named(tmp_path, kind, image_size):
    file = save_tree(tmp_path, {"a": 1}, (64, 64)) / "a" / "000.png"
    file.write_bytes({"text": b"no image", "empty": b"", "truncated": file.read_bytes()[:3000]}[kind])
    with pytest.raises(ArchrepairError, match="cannot decode .*000.png") as caught:
        load_dataset(f"folder:{tmp_path}", image_size=image_size)
    assert "\n" not in str(caught.value)


def test_places_without_images(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ArchrepairError, match=str(path)):
            load_dataset(f"folder:{path}")


@pytest.mark.parametrize("name", ["", ":gaussian_noise:3"])
def test_decoded_on_demand_is_the_same_as_decoded_at_once(tmp_path, monkeypatch, name):
    save_tree(tmp_path, {"a": 6, "b": 7}, (32, 32))
    eager = load_dataset(f"folder:{tmp_path}{name}", "train")
    monkeypatch.setattr(files, "_EAGER_BYTES", 0)
    lazy = load_dataset(f"folder:{tmp_path}{name}", "train")
    some = torch.tensor([3, 0, 8])
    assert isinstance(lazy.images, FolderImages) and lazy.size == eager.size == 32 and torch.equal(lazy.labels, eager.labels)
    assert torch.equal(lazy.batch(some), eager.batch(some))
    again = torch.tensor([1, 2])
    assert torch.equal(lazy.select(some).batch(again), eager.select(some).batch(again))
    assert lazy.select(some).index.tolist() == eager.select(some).index.tolist()
    assert Normalize.of(lazy) == Normalize.of(eager)


# --- classes by name


def _photos(root: Path, parts: dict[str, dict[str, int]], level: dict[str, int]) -> Path:
    "Two gray pictures per class (or as many as given) in every part, so that a picture tells its class."
    for part, counts in parts.items():
        for name, n in counts.items():
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (level[name],) * 3).save(root / part / name / f"{i}.png")
    return root


LEVELS = {"cat": 10, "dog": 60, "owl": 200, "zebra": 250}


@pytest.mark.parametrize(("test", "labels"), [
    ({"dog": 2, "owl": 1}, [1, 1, 2]), ({"cat": 1, "owl": 2}, [0, 2, 2]), ({"cat": 1, "dog": 1, "owl": 1}, [0, 1, 2]),
    ({"cat": 0, "owl": 1}, [2]), ({"zebra": 0, "owl": 1}, [2]),
], ids=["first class missing", "middle class missing", "all there", "empty", "another, but empty"])
def test_a_test_folder_is_read_with_the_classes_of_the_training_images(tmp_path, test, labels):
    _photos(tmp_path, {"train": {"cat": 2, "dog": 2, "owl": 2}, "test": test}, LEVELS)
    images = load_dataset(f"folder:{tmp_path}", "test")
    assert images.classes == load_dataset(f"folder:{tmp_path}", "train").classes == ("cat", "dog", "owl")
    assert images.labels.tolist() == labels
    assert [LEVELS[images.classes[y]] for y in labels] == images.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_that_only_the_test_images_have_is_named(tmp_path, split):
    _photos(tmp_path, {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "zebra": 1}}, LEVELS)
    with pytest.raises(ArchrepairError, match=r"has images of zebra, not among those of .*train \(cat, dog\)") as caught:
        load_dataset(f"folder:{tmp_path}", split)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_said_once(tmp_path):
    _photos(tmp_path, {"train": {"cat": 2, "dog": 2, "zebra": 0}, "test": {"dog": 1}}, LEVELS)
    with pytest.warns(Notice, match="no train images of zebra; no test images of cat, zebra$") as caught:
        train, test = (load_dataset(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert len(caught) == 1 and train.classes == test.classes == ("cat", "dog", "zebra")


NAMES = ("cat", "dog", "owl")


def _npz_pair(root: Path, train: dict, test: dict) -> Path:
    "train.npz and test.npz of gray images, whose level is that of their class's name."
    for split, part in (("train", train), ("test", test)):
        names = part.pop("names")
        images = np.stack([np.full((8, 8, 3), LEVELS[name], np.uint8) for name in names])
        np.savez(root / f"{split}.npz", images=images, **part)
    return root


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("test", [
    {"labels": [2, 1, 0], "classes": NAMES}, {"labels": [0, 1, 2], "classes": ("owl", "dog", "cat")},
    {"labels": [0, 1, 2], "classes": ("owl", "dog", "cat", "zebra")}, {"labels": ["owl", "dog", "cat"]},
    {"labels": [b"owl", b"dog", b"cat"]}, {"labels": ["owl", "dog", "cat"], "classes": ("owl", "cat", "dog")},
    {"labels": np.array([2, 1, 0], ">u2")}, {"labels": np.array([2, 1, 0], np.uint64)[::-1][::-1], "classes": NAMES},
], ids=["same order", "other order", "one more without images", "names", "bytes", "names in another order", "big-endian", "unsigned"])
def test_npz_files_are_matched_by_name(tmp_path, split, test):
    train = {"names": NAMES, "labels": np.arange(3), "classes": NAMES}
    images = load_dataset(f"npz:{_npz_pair(tmp_path, train, {'names': ('owl', 'dog', 'cat'), **test})}", split)
    assert images.classes == NAMES
    assert [LEVELS[images.classes[y]] for y in images.labels] == images.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("train", "test", "message"), [
    ({"labels": [0, 1, 2], "classes": NAMES}, {"labels": [0, 1, 2], "classes": ("cat", "dog", "zebra")}, "has images of zebra, not among"),
    ({"labels": [0, 1, 2]}, {"labels": [0, 1, 2], "classes": NAMES}, "has images of cat, dog, owl, not among"),
    ({"labels": [0, 1, 1], "classes": ("cat", "dog")}, {"labels": [0, 1, 2]}, "has images of 0, 1, 2, not among"),
    ({"labels": [0, 1, 2], "classes": NAMES}, {"labels": ["cat", "dog", "emu"], "classes": NAMES}, "labels emu, which are not among"),
    ({"labels": [0, 1, 1], "classes": ("a", "a")}, {"labels": [0, 1, 2], "classes": NAMES}, "two classes are called 'a'"),
])
@pytest.mark.parametrize("split", ["train", "test"])
def test_npz_files_whose_classes_do_not_match_are_refused(tmp_path, split, train, test, message):
    _npz_pair(tmp_path, {"names": NAMES, **train}, {"names": NAMES, **test})
    with pytest.raises(ArchrepairError, match=message) as caught:
        load_dataset(f"npz:{tmp_path}", split)
    assert "\n" not in str(caught.value)


def test_numbers_run_to_the_highest_label_of_either_file(tmp_path):
    _npz_pair(tmp_path, {"names": NAMES[1:], "labels": [0, 1]}, {"names": NAMES, "labels": [0, 1, 2]})
    with pytest.warns(Notice, match="no train images of 2$") as caught:
        assert {load_dataset(f"npz:{tmp_path}", split).classes for split in ("train", "test")} == {("0", "1", "2")}
    assert len(caught) == 1


# --- one size


@pytest.mark.parametrize(("train", "test", "asked", "size"), [
    ([20, 300, 300, 300], [20, 20], None, 224), ([32, 32, 32], [300, 300], None, 32), ([300, 300], [20, 20], 48, 48),
])
def test_both_splits_have_one_size(tmp_path, train, test, asked, size):
    for split, sides in (("train", train), ("test", test)):
        for c in ("a", "b"):
            (tmp_path / split / c).mkdir(parents=True)
            for i, side in enumerate(sides):
                Image.new("RGB", (side, side)).save(tmp_path / split / c / f"{i}.png")
    resized = 2 * sum(side != size for side in (*train, *test))
    with pytest.warns(Notice, match=f"{resized} of {2 * len(train + test)} images are resized to {size}×{size} px"):
        sizes = [load_dataset(f"folder:{tmp_path}", split, image_size=asked).sides for split in ("train", "test")]
    assert sizes == [(size, size)] * 2


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("sides", [(8, 6), (6, 8), (6, 6)])
def test_npz_files_of_two_sizes_are_refused(tmp_path, split, sides):
    write_npz(tmp_path / "train.npz")
    write_npz(tmp_path / "test.npz", images=np.zeros((20, *sides, 3), np.uint8))
    with pytest.raises(ArchrepairError, match=r"has images of \d×\d px and the file beside it of \d×\d; expected one size"):
        load_dataset(f"npz:{tmp_path}", split)


# --- what else lies in a folder


def test_what_is_left_out_and_scaled_is_said_in_one_warning(tmp_path):
    for split in ("train", "test"):
        save_tree(tmp_path / split, {"a": 2, "b": 2})
        Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / split / "a" / "000.png")
        (tmp_path / split / "a" / "._001.png").write_bytes(b"\0\5\x16\7")
        (tmp_path / split / "a" / "notes.txt").write_text("x")
    with pytest.warns(Notice) as caught:
        train, _ = (load_dataset(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert [str(w.message) for w in caught] == [f"folder:{tmp_path}: 2 images of 16 bits, scaled from 0…65535 to 0…255; "
                                                "files left out: 2 .txt, 2 hidden"]
    assert train.images[0].unique().tolist() == [35] and len(train) == 4


def test_float_images_of_both_splits_share_one_scale(tmp_path):
    for split, high in (("train", 2000.0), ("test", 1000.0)):
        for c in ("a", "b"):
            (tmp_path / split / c).mkdir(parents=True)
            Image.fromarray(np.array([[-1000.0] * 8] * 4 + [[high] * 8] * 4, np.float32)).save(tmp_path / split / c / "x.tif")
    with pytest.warns(Notice, match="4 images of 32 bits, scaled from -1000…2000 to 0…255"):
        train, test = (load_dataset(f"folder:{tmp_path}", split).images for split in ("train", "test"))
    assert train.unique().tolist() == [0, 255] and test.unique().tolist() == [0, 170]


def test_a_class_folder_may_be_a_link(tmp_path):
    save_tree(tmp_path / "elsewhere", {"a": 3}), save_tree(tmp_path / "photos", {"b": 2})
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    train, test = (load_dataset(f"folder:{tmp_path}/photos", split) for split in ("train", "test"))
    assert train.classes == ("a", "b") and (train.labels.bincount() + test.labels.bincount(minlength=2)).tolist() == [3, 2]


# --- content


@pytest.mark.parametrize("kind", ["divided folder", "folder", "npz", "pair of npz"])
def test_content_does_not_depend_on_the_place(tmp_path, kind):
    roots = [tmp_path / "here" / "photos", tmp_path / "there" / "photos"]
    for root in roots:
        root.mkdir(parents=True)
        if "folder" in kind:
            for part in ("train", "test") if kind.startswith("divided") else ("",):
                save_tree(root / part, {"a": 2, "b": 1})
        else:
            for name in ("train.npz", "test.npz") if kind.startswith("pair") else ("one.npz",):
                np.savez(root / name, images=pixels(4), labels=np.arange(4) % 2)
    places = [root / "one.npz" if kind == "npz" else root for root in roots]
    assert content_of(places[0]) == content_of(places[1]) and content_of(places[0], "train") == content_of(places[1], "train")
    changed = max(path for path in roots[1].rglob("*") if path.is_file() and "test" not in path.relative_to(roots[1]).as_posix())
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert content_of(places[0]) != content_of(places[1]) and content_of(places[0], "train") != content_of(places[1], "train")


def test_the_content_of_a_split_is_its_own(tmp_path):
    for split in ("train", "test"):
        save_tree(tmp_path / split, {"a": 2, "b": 1})
    before, whole = content_of(tmp_path, "train"), content_of(tmp_path)
    (tmp_path / "test" / "a" / "000.png").unlink()
    assert content_of(tmp_path, "train") == before and content_of(tmp_path) != whole
    (tmp_path / "train" / "c").mkdir()  # one more class
    assert content_of(tmp_path, "train") != before
