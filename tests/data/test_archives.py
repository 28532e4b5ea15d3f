"""Published archives: tiny ones in the published layout, read, matched with the clean set, damaged, and fetched."""
import hashlib
import io
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import CORRUPTIONS
from archrepair.corruptions.catalogue import corrupt
from archrepair.data import archives
from archrepair.data.archives import ARCHIVES, archive_folder, download_archive, find_archive, published_order

CLASSES = ("n01", "n02", "n03")


@pytest.fixture
def clean():
    g = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(30, 3, 5, 5, generator=g), size=32, mode="bicubic").clamp(0, 1)
    return SimpleNamespace(images=(images * 255).byte().permute(0, 2, 3, 1).contiguous(), labels=torch.arange(30) % 3, classes=CLASSES)


@pytest.fixture
def arrays(tmp_path, clean):
    "CIFAR-10-C in small, its rows shuffled; glass blur, drawn at random, has other pixels than ours."
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", clean.labels[order].repeat(5).to(torch.uint8).numpy())
    for name in ("brightness", "fog"):
        version = [corrupt(clean.images[order], name, s, dataset="published") for s in range(1, 6)]
        np.save(folder / f"{name}.npy", torch.cat(version).numpy())
    return SimpleNamespace(root=tmp_path, folder=folder, order=order)


def test_arrays_come_in_their_own_order_without_a_clean_set(arrays, clean):
    for severity in range(1, 6):
        found = find_archive("cifar10", "fog", severity, arrays.root)
        assert torch.equal(found.images, corrupt(clean.images[arrays.order], "fog", severity, dataset="published"))
        assert torch.equal(found.labels, clean.labels[arrays.order]) and found.labels.dtype == torch.int64
        assert not found.aligned and found.classes is None and found.source == arrays.folder / "fog.npy"


def test_arrays_come_in_the_order_of_the_clean_set(arrays, clean):
    found = find_archive("cifar10", "fog", 4, arrays.root, clean)
    at_random = torch.argsort(arrays.order)  # image i was corrupted as row at_random[i]
    assert found.aligned and torch.equal(found.labels, clean.labels)
    assert torch.equal(found.images, corrupt(clean.images, "fog", 4, dataset="published", indices=at_random))
    few = SimpleNamespace(images=clean.images[5:9], labels=clean.labels[5:9])
    assert torch.equal(find_archive("cifar10", "fog", 4, arrays.root, few).images, found.images[5:9])


def test_order_survives_duplicates_and_rejects_strangers(clean):
    images = clean.images.clone()
    images[3] = images[0]
    published = corrupt(images, "brightness", 1)
    order = published_order(published, clean.labels, images, clean.labels)
    assert sorted(order.tolist()) == list(range(30)) and torch.equal(order[1:3], torch.tensor([1, 2]))
    noisy = (published.int() + torch.randint(-1, 2, published.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    assert torch.equal(published_order(noisy, clean.labels, images, clean.labels)[1:3], torch.tensor([1, 2]))
    with pytest.raises(ArchrepairError, match="1 of 30 clean images have no counterpart"):
        images[7] = 255 - images[7]
        published_order(published, clean.labels, images, clean.labels)
    with pytest.raises(ArchrepairError, match="no counterpart"):
        published_order(published, clean.labels, clean.images, clean.labels.roll(1))


def test_without_brightness_rows_cannot_be_matched(arrays, clean):
    (arrays.folder / "brightness.npy").unlink()
    assert not find_archive("cifar10", "fog", 1, arrays.root, clean).aligned


def test_absent_is_none(arrays, tmp_path):
    assert find_archive("cifar10", "snow", 1, arrays.root) is None
    assert find_archive("cifar100", "fog", 1, arrays.root) is None
    assert find_archive("digits", "fog", 1, arrays.root) is None
    assert archive_folder("cifar10", tmp_path / "nowhere") is None
    nested = tmp_path / "other" / "cifar10"
    nested.mkdir(parents=True)
    arrays.folder.rename(nested / "CIFAR-10-C")
    assert find_archive("cifar10", "fog", 1, tmp_path / "other") is not None


@pytest.mark.parametrize("damage", ["cut", "float", "rows", "labels", "no labels"])
def test_damaged_arrays_are_named(arrays, damage):
    fog, labels = arrays.folder / "fog.npy", arrays.folder / "labels.npy"
    if damage == "cut":
        fog.write_bytes(fog.read_bytes()[:-100])
    elif damage == "float":
        np.save(fog, np.load(fog).astype(np.float32))
    elif damage == "rows":
        np.save(fog, np.load(fog)[:-1])
    elif damage == "labels":
        np.save(labels, np.load(labels)[:-5])
    else:
        labels.unlink()
    with pytest.raises(ArchrepairError, match="unpack the archive again") as error:
        find_archive("cifar10", "fog", 3, arrays.root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dataset", "nest"), [("tiny-imagenet", ""), ("imagenet", ""), ("imagenet", "weather")])
def test_trees(tmp_path, clean, dataset, nest):
    base = tmp_path / ARCHIVES[dataset].folder / nest / "fog" / "2"
    for i, label in enumerate(clean.labels.tolist()):
        (base / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(clean.images[i].numpy()).save(base / CLASSES[label] / f"val_{i:03}.JPEG", quality=85)
    found = find_archive(dataset, "fog", 2, tmp_path)
    assert found.classes == CLASSES and found.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10 and not found.aligned
    assert [f.stem for f in found.images[:3]] == ["val_000", "val_003", "val_006"]
    assert find_archive(dataset, "fog", 1, tmp_path) is None
    files = [tmp_path / CLASSES[label] / f"val_{i:03}.png" for i, label in enumerate(clean.labels.tolist())]
    found = find_archive(dataset, "fog", 2, tmp_path, SimpleNamespace(images=SimpleNamespace(files=files[4:8]), classes=("n00", *CLASSES)))
    assert found.aligned and [f.stem for f in found.images] == [f.stem for f in files[4:8]]
    assert found.labels.tolist() == (clean.labels[4:8] + 1).tolist()
    with pytest.raises(ArchrepairError, match="its class 'n03' is not one of the clean set's"):
        find_archive(dataset, "fog", 2, tmp_path, SimpleNamespace(images=clean.images, classes=("n01", "n02")))


def test_extra_tree_of_tiny_imagenet(tmp_path):
    (tmp_path / "Tiny-ImageNet-C").mkdir()
    leaf = tmp_path / "Tiny-ImageNet-C-extra" / "gaussian_blur" / "5" / "n01"
    leaf.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(leaf / "a.JPEG")
    assert len(find_archive("tiny-imagenet", "gaussian_blur", 5, tmp_path).images) == 1


def test_bad_severity(arrays):
    with pytest.raises(ArchrepairError, match="severity 6 of fog"):
        find_archive("cifar10", "fog", 6, arrays.root)


def test_every_corruption_is_in_exactly_one_file():
    assert set(CORRUPTIONS) <= set(archives.PUBLISHED_CORRUPTIONS)
    for archive in ARCHIVES.values():
        assert all(len(md5) == 32 for md5 in archive.files.values()) and set(archive.contents) <= set(archive.files)


def test_download(arrays, tmp_path, monkeypatch):
    source = tmp_path / "site"
    source.mkdir()
    with tarfile.open(source / "CIFAR-10-C.tar", "w") as tar:
        tar.add(arrays.folder, "CIFAR-10-C")
    md5 = hashlib.md5((source / "CIFAR-10-C.tar").read_bytes()).hexdigest()
    local = replace(ARCHIVES["cifar10"], url=source.as_uri(), files={"CIFAR-10-C.tar": md5})
    monkeypatch.setitem(ARCHIVES, "cifar10", local)
    root = tmp_path / "new"
    assert download_archive("cifar10", root) == root / "CIFAR-10-C"
    assert find_archive("cifar10", "fog", 1, root) is not None
    assert [p.name for p in root.iterdir()] == ["CIFAR-10-C"]
    monkeypatch.setitem(ARCHIVES, "cifar10", replace(local, files={"CIFAR-10-C.tar": "0" * 32}))
    with pytest.raises(ArchrepairError, match=f"its MD5 is {md5}"):
        download_archive("cifar10", tmp_path / "bad")
    assert not any((tmp_path / "bad").iterdir())


@pytest.mark.parametrize("filters", [True, False], ids=["filters", "Python 3.11.0"])
def test_unpacking_stays_inside_the_folder(filters, tmp_path, monkeypatch):
    if filters and not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python has no filters")
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    names = {"good": "folder/a.txt", "outside": "../evil.txt", "absolute": f"{tmp_path}/evil.txt", "link": "link"}
    for kind, name in names.items():
        with tarfile.open(tmp_path / f"{kind}.tar", "w") as tar:
            member = tarfile.TarInfo(name)
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            else:
                member.size = 1
            tar.addfile(member, io.BytesIO(b"a"))
    target = tmp_path / "target"
    target.mkdir()
    for kind in names:
        with tarfile.open(tmp_path / f"{kind}.tar") as tar:
            if kind in ("good", "absolute") and (filters or kind == "good"):
                archives._unpack(tar, target)  # filters make an absolute name a relative one
            else:
                with pytest.raises(tarfile.TarError):
                    archives._unpack(tar, target)
    assert (target / "folder" / "a.txt").read_text(encoding="utf-8") == "a"
    assert not (tmp_path / "evil.txt").exists() and not (target / "link").exists()


def test_download_picks_the_file_that_holds_the_corruption(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(archives, "_fetch", lambda url, md5, target: fetched.append((url.rsplit("/", 1)[1], target.name)))
    download_archive("imagenet", tmp_path, "fog")
    download_archive("tiny-imagenet", tmp_path, "fog")
    download_archive("tiny-imagenet", tmp_path, "gaussian_blur")
    assert fetched == [("weather.tar", "ImageNet-C"), ("Tiny-ImageNet-C.tar", tmp_path.name), ("Tiny-ImageNet-C-extra.tar", tmp_path.name)]
    for arguments, message in ((("cifar", tmp_path), "unknown archived dataset 'cifar'"),
                               (("cifar10", tmp_path, "rain"), "unknown published corruption 'rain'")):
        with pytest.raises(ArchrepairError, match=message):
            download_archive(*arguments)
