"""Sets of images, from a name to pixels: what is accepted, what is refused, and that nothing is drawn twice differently."""
import itertools
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

import archrepair.data.datasets as module
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import FolderImages, ImageSet, Normalize, concatenate, holdout, load_dataset, parse_version


def pixels(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def tiny(n: int = 6, **changes) -> ImageSet:
    return ImageSet(**{"images": pixels(n), "labels": np.arange(n) % 2, "classes": ("cat", "dog"), "name": "tiny"} | changes)


def save_tree(folder, counts: dict[str, int], size=(8, 8), mode="RGB"):
    for c, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(pixels(1, 80, seed=100 * c + i)[0][:size[1], :size[0]]).convert(mode).save(folder / name / f"{i:03}.png")
    return folder


# --- ImageSet


def test_a_subset_of_a_subset_still_knows_its_images():
    whole = tiny(10)
    part = whole.select(torch.tensor([7, 2, 9, 4])).select(torch.tensor([3, 0]))
    assert part.index.tolist() == [4, 7] and part.labels.tolist() == [0, 1] and len(part) == 2
    assert torch.equal(part.images, whole.images[[4, 7]]) and torch.equal(part.batch(torch.tensor([1])), whole.images[7:8])
    assert part.classes == whole.classes and part.size == 8


def test_select_may_repeat_and_may_be_empty():
    assert tiny().select(torch.tensor([1, 1])).index.tolist() == [1, 1]
    assert len(tiny().select(torch.arange(0))) == 0


@pytest.mark.parametrize("change", [
    {"images": pixels(6).astype(np.float32)}, {"images": pixels(6)[..., :1]}, {"images": pixels(6)[0]}, {"images": pixels(6).transpose(0, 3, 1, 2)},
    {"images": pixels(5)}, {"labels": np.zeros(5, int)}, {"labels": np.zeros((6, 1), int)}, {"labels": np.zeros(6)},
    {"labels": [0, 1, 2, 0, 1, 0]}, {"labels": [0, -1, 0, 0, 0, 0]}, {"classes": ()},
], ids=["float", "gray", "one image", "channels first", "few images", "few labels", "2-d labels", "float labels", "too large", "negative", "no classes"])
def test_what_is_no_set_is_refused_in_one_line(change):
    with pytest.raises(ArchrepairError, match="^tiny: .*expected") as caught:
        tiny(**change)
    assert "\n" not in str(caught.value)


def test_labels_of_any_integer_type_become_int64():
    for kind in (np.uint8, np.uint16, np.int32, np.uint64):
        assert tiny(labels=np.array([0, 1, 0, 1, 0, 1], kind)).labels.dtype == torch.int64


def test_concatenate_keeps_the_order_and_refuses_other_sizes():
    a, b = tiny(3), tiny(2, images=pixels(2, seed=5), labels=[1, 1])
    both = concatenate(a, b)
    assert torch.equal(both.images, torch.cat([a.images, b.images])) and both.labels.tolist() == [0, 1, 0, 1, 1]
    for other in (tiny(2, images=pixels(2, 4)), tiny(2, classes=("cat", "cow"))):
        with pytest.raises(ArchrepairError, match="cannot be joined"):
            concatenate(a, other)


# --- Normalize


@pytest.mark.parametrize("name", [*module.STATISTICS, None])
def test_normalize_equals_torchvision_on_real_pixels(digits_test, name):
    from torchvision import transforms

    ours = Normalize(*module.STATISTICS[name]) if name else Normalize.of(digits_test)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(ours.mean, ours.std)])
    batch = digits_test.images[:16].clone()
    x = ours(batch)
    assert torch.equal(x, torch.stack([theirs(image.numpy()) for image in batch])) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last) and torch.equal(batch, digits_test.images[:16])


def test_normalize_takes_floats_in_0_to_1_and_leaves_them_alone(digits_test):
    ours, batch = Normalize.of(digits_test), digits_test.images[:4]
    floats = batch.permute(0, 3, 1, 2).float() / 255
    kept = floats.clone()
    assert torch.equal(ours(floats), ours(batch)) and torch.equal(floats, kept)


def test_normalize_of_an_unknown_set_gives_mean_0_and_deviation_1():
    images = tiny(50, images=pixels(50), labels=np.zeros(50, int))
    x = Normalize.of(images)(images.images)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert Normalize.of(tiny(name="cifar10:fog:3/test")) == Normalize(*module.STATISTICS["cifar10"])


def test_normalize_of_a_large_sorted_set_sees_all_of_it():
    dark_then_light = np.repeat(np.array([0, 200], np.uint8), 2500)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    mean = Normalize.of(ImageSet(dark_then_light, np.zeros(5000, int), ("a",))).mean
    assert abs(mean[0] - 100 / 255) < 0.01


def test_normalize_of_constant_images_stays_finite():
    black = tiny(images=np.zeros((6, 8, 8, 3), np.uint8))
    assert torch.isfinite(Normalize.of(black)(black.images)).all()


# --- names


@pytest.mark.parametrize(("name", "parts"), [
    ("cifar10", ("cifar10", None, 0)), ("cifar10:fog:3", ("cifar10", "fog", 3)), ("folder:/a/b", ("folder:/a/b", None, 0)),
    ("folder:/a/b:fog:5", ("folder:/a/b", "fog", 5)), ("npz:a.npz", ("npz:a.npz", None, 0)), ("npz:a.npz:snow:1", ("npz:a.npz", "snow", 1)),
    ("folder:C:\\a", ("folder:C:\\a", None, 0)),
])
def test_parse_version(name, parts):
    assert parse_version(name) == parts


@pytest.mark.parametrize("name", ["cifar10:fog", "cifar10:fog:x", "cifar10:3", "cifar10:", "cifar10:fog:-1", "cifar10:fog:³"])
def test_half_a_version_is_refused(name):
    with pytest.raises(ArchrepairError, match="expected NAME or NAME:CORRUPTION:SEVERITY"):
        parse_version(name)


@pytest.mark.parametrize("name", ["cifar11", "folder:", "npz:", "digits:nothing:3", "digits:fog:9", "cifar10:a:b:3", ""])
def test_unknown_datasets(home, name):
    with pytest.raises(ArchrepairError) as caught:
        load_dataset(name, download=False)
    assert "\n" not in str(caught.value)


def test_unknown_split():
    with pytest.raises(ArchrepairError, match="unknown split 'val'"):
        load_dataset("digits", "val")


# --- digits


def test_digits_are_deterministic_disjoint_and_complete(digits, digits_test):
    from sklearn.datasets import load_digits

    again = load_dataset("digits", "train")
    assert torch.equal(again.images, digits.images) and torch.equal(again.labels, digits.labels)
    assert (len(digits), len(digits_test), digits.size) == (1200, 597, 32) and digits.images.dtype == torch.uint8
    both = torch.cat([digits.labels, digits_test.labels]).bincount()
    assert both.tolist() == np.bincount(load_digits().target).tolist()
    shrink = lambda s: s.images[..., 0].float().reshape(len(s), 8, 4, 8, 4).mean((2, 4))  # back to 8×8, roughly
    raw = torch.from_numpy(load_digits().images).float() * 255 / 16
    nearest = torch.cdist(shrink(digits_test).flatten(1), raw.flatten(1)).argmin(1)
    assert (torch.from_numpy(load_digits().target)[nearest] == digits_test.labels).float().mean() > 0.99


def test_corrupted_digits_keep_labels_and_order(digits_test):
    noisy = load_dataset("digits:gaussian_noise:3", "test")
    assert torch.equal(noisy.labels, digits_test.labels) and torch.equal(noisy.index, digits_test.index)
    assert not torch.equal(noisy.images, digits_test.images) and noisy.name == "digits:gaussian_noise:3/test"
    assert torch.equal(noisy.images, load_dataset("digits:gaussian_noise:3", "test").images)


# --- npz


def write_npz(path, **changes):
    np.savez(path, **{k: v for k, v in ({"images": pixels(20), "labels": np.arange(20) % 2} | changes).items() if v is not None})
    return path


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


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "bad zip", "npy", "truncated", "damaged", "no images", "no labels", "float images",
                                  "objects", "object labels", "gray", "range", "lengths", "negative", "nothing"])
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


@pytest.mark.parametrize(("size", "asked", "expected"), [((8, 8), None, 8), ((64, 64), None, 64), ((70, 70), None, 224), ((40, 30), None, 224),
                                                        ((40, 30), 32, 32), ((8, 8), 16, 16), ((64, 20), 16, 16)])
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
    monkeypatch.setattr(module, "_EAGER_BYTES", 0)
    lazy = load_dataset(f"folder:{tmp_path}{name}", "train")
    some = torch.tensor([3, 0, 8])
    assert isinstance(lazy.images, FolderImages) and lazy.size == eager.size == 32 and torch.equal(lazy.labels, eager.labels)
    assert torch.equal(lazy.batch(some), eager.batch(some))
    again = torch.tensor([1, 2])
    assert torch.equal(lazy.select(some).batch(again), eager.select(some).batch(again))
    assert lazy.select(some).index.tolist() == eager.select(some).index.tolist()
    assert Normalize.of(lazy) == Normalize.of(eager)


def test_imagenet_says_where_its_images_belong(home):
    with pytest.raises(ArchrepairError, match="imagenet"):
        load_dataset("imagenet")
    save_tree(home / "data" / "imagenet" / "val", {"n01": 1}, (50, 40))
    assert load_dataset("imagenet", "test").size == 224
    with pytest.raises(ArchrepairError, match="train/<wnid>"):
        load_dataset("imagenet", "train")


# --- caches


def test_a_cache_in_the_projects_data_folder_is_found(home):
    (home / "data" / "cifar10").mkdir(parents=True)
    write_npz(home / "data" / "cifar10" / "test.npz", classes=np.array(["a", "b"]))
    images = load_dataset("cifar10", "test", download=False)
    assert len(images) == 20 and images.name == "cifar10/test" and images.classes == ("a", "b")
    assert Normalize.of(images) == Normalize(*module.STATISTICS["cifar10"])


def test_an_absent_cache_without_network_names_the_file(home, monkeypatch):
    target = str(home / "data" / "cifar10" / "test.npz")
    with pytest.raises(ArchrepairError) as caught:
        load_dataset("cifar10", "test", download=False)
    assert target in str(caught.value) and "\n" not in str(caught.value)
    for error in (urllib.error.URLError("Name or service not known"), RuntimeError("File not found or corrupted.\nmore"), OSError()):
        monkeypatch.setattr(module, "_download", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ArchrepairError) as caught:
            load_dataset("cifar10", "test")
        assert target in str(caught.value) and "\n" not in str(caught.value)


def test_a_download_writes_both_caches_once(home, monkeypatch):
    import torchvision.datasets

    calls = []

    class Fake:
        def __init__(self, root, train, download):
            calls.append(train)
            self.data, self.targets, self.classes = pixels(4 if train else 2, seed=train), [1, 0, 1, 0][:4 if train else 2], ["x", "y"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    test = load_dataset("cifar100", "test")
    train = load_dataset("cifar100", "train")
    assert sorted(calls) == [False, True] and len(train) == 4 and torch.equal(test.images, torch.from_numpy(pixels(2, seed=0)))
    with np.load(home / "data" / "cifar100" / "train.npz") as arrays:
        assert {k: arrays[k].dtype.kind for k in arrays} == {"images": "u", "labels": "i", "classes": "U"}


def test_the_official_tiny_imagenet_tree_is_packed(tmp_path):
    source = tmp_path / "tiny-imagenet-200"
    for wnid, n in (("n2", 2), ("n1", 1)):
        save_tree(source / "train" / wnid, {"images": n}, (64, 64))
        for file in (source / "train" / wnid / "images").glob("*.png"):
            file.rename(file.with_suffix(".JPEG"))
    save_tree(source / "val", {"images": 2}, (64, 64))
    (source / "wnids.txt").write_text("n2\nn1\n")
    (source / "val" / "val_annotations.txt").write_text("001.png\tn1\t0\t0\t9\t9\n000.png\tn2\t0\t0\t9\t9\n")
    module._pack_tiny(source, tmp_path)
    train, test = (module._read_cache(tmp_path / f"{s}.npz", "tiny") for s in ("train", "test"))
    assert train.classes == ("n1", "n2") and train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1]
    assert torch.equal(test.images[0], torch.from_numpy(np.array(Image.open(source / "val" / "images" / "001.png"))))


# --- holdout


@pytest.mark.parametrize(("fraction", "seed"), [*itertools.product([0.1, 1 / 3, 0.5, 0.55, 0.07, 0.2, 0.999], [0, 7])])
def test_holdout_is_exact_fair_and_deterministic(fraction, seed):
    sizes = [1, 3, 50, 97, 10, 333]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    rest, part = holdout(labels, fraction, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist()) and part.tolist() == sorted(part.tolist())
    assert len(part) == int(np.floor(len(labels) * fraction + 1e-9))
    taken = labels[part].bincount(minlength=len(sizes))
    assert all(abs(int(t) - n * fraction) <= 1 for t, n in zip(taken, sizes))
    assert torch.equal(part, holdout(labels, fraction, seed)[1])
    assert fraction > 0.99 or not torch.equal(part, holdout(labels, fraction, seed + 1)[1])


@pytest.mark.parametrize(("n", "k"), [(9999, 777), (40000, 777), (45000, 20000), (1080, 333), (50000, 49999), (50000, 1)])
def test_holdout_meets_a_number_of_images_exactly(n, k):
    assert len(holdout(torch.arange(n) % 10, k / n, 0)[1]) == k


def test_holdout_at_the_ends():
    labels = torch.arange(10) % 3
    assert len(holdout(labels, 0.0, 0)[1]) == 0 and len(holdout(labels, 1.0, 0)[1]) == 10
    assert [len(h) for h in holdout(labels[:0], 0.5, 0)] == [0, 0]


def test_holdout_draws_every_image_equally_often():
    labels = torch.arange(20) % 2
    counts = sum(holdout(labels, 0.3, seed)[1].bincount(minlength=20) for seed in range(1000))
    assert counts.min() > 230 and counts.max() < 370  # 300 expected, standard deviation 14
