"""Files of one's own: npz files and folders of images, how they are divided and decoded, and how a broken one is named."""
import numpy as np
import pytest
import torch
from PIL import Image

from archrepair.core.errors import ArchrepairError
from archrepair.data import files
from archrepair.data.datasets import load_dataset
from archrepair.data.files import FolderImages
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
