"""npz files: arrays of any type and shape, lies about their size, and zips of all kinds."""

import io
import struct
import zipfile
import zlib

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from archrepair.core.registry import CORRUPTIONS
from archrepair.data.datasets import fingerprint, load_dataset
from archrepair.experiments.originals import slug, weights_of
from support.fuzz import attempt, broken, damage, filename, fuzz, ground, text

KIND = "arrays"
TYPES = ["u1"] * 8 + [
    "i1",
    "<i4",
    ">i4",
    "<i8",
    ">u2",
    "<u8",
    "<f4",
    ">f8",
    "f2",
    "?",
    "c8",
    "S3",
    "<U3",
    ">U2",
    "M8[D]",
    "m8[s]",
    "V4",
    "O",
    "u1,f4",
    "<f16",
]
types = st.sampled_from([np.dtype(kind) for kind in TYPES])
sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 8])


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    "Images, most of them right."
    if draw(st.integers(0, 3)):
        n, height, width = draw(st.integers(0, 12)), draw(st.sampled_from([1, 2, 8, 8, 8, 9, 32])), draw(st.sampled_from([0, 8, 8, 8, 32]))
        shape: list[int] = [n, height, width or height, 3]
    else:
        shape = draw(st.lists(sizes, max_size=5))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, shape).astype(np.uint8)
    kind = draw(types) if draw(st.integers(0, 3)) == 0 else np.dtype(np.uint8)
    with np.errstate(all="ignore"):
        try:
            values = values.astype(kind)
        except (TypeError, ValueError):
            values = np.zeros(shape, kind)
    return np.asfortranarray(values) if draw(st.booleans()) else values


@st.composite
def targets(draw: st.DrawFn, n: int) -> np.ndarray:
    "Labels, most of them right for `n` images."
    kind = draw(st.sampled_from(["numbers"] * 4 + ["names", "column", "one-hot", "bytes", "objects", "floats", "short", "wild", "text"]))
    numbers = np.arange(n) % draw(st.integers(1, 4))
    if kind == "wild":
        return np.array(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)), np.int64)
    if kind == "text":
        return np.array(draw(st.lists(text.map(lambda word: word[:40]), min_size=n, max_size=n)), str)
    return {
        "numbers": numbers.astype(draw(st.sampled_from(["<i8", ">i4", "u1", "i1", "<u8", "?"]))),
        "names": numbers.astype(str),
        "column": numbers[:, None],
        "one-hot": np.eye(4, dtype=int)[numbers],
        "bytes": numbers.astype("S"),
        "objects": numbers.astype(object),
        "floats": numbers + 0.5,
        "short": numbers[1:],
    }[kind]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def lie(shape: str, kind: str = "|u1", content: bytes = b"\0" * 64) -> bytes:
    "An array whose header says this shape and type."
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n" + content


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def bomb(gigabytes: int = 3) -> bytes:
    "A file of a few megabytes whose images take this many gigabytes."
    n = gigabytes << 20
    packer = zlib.compressobj(9, wbits=-15)
    head = lie(f"({n}, 32, 32, 1)".replace("1)", "3)"), content=b"")
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    chunk = packer.compress(bytes(3 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    file = zipped({"images.npy": b"", "labels.npy": npy(np.arange(n % 1000) % 3)})
    body = first + chunk * (n // 1024) + zlib.compressobj(9, wbits=-15).flush()
    name, size = b"images.npy", len(head) + n * 3072
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 8, 0, 33, 0, len(body), min(size, 2**32 - 1), len(name), 0) + name + body
    central = (
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 8, 0, 33, 0, len(body), min(size, 2**32 - 1), len(name), 0, 0, 0, 0, 0, 0) + name
    )
    assert file
    return local + central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)


SHAPES = [
    "(1000000000000, 32, 32, 3)",
    "(-1, 8, 8, 3)",
    "(2, 8, 8)",
    "(0, 8, 8, 3)",
    "(True, 8, 8, 3)",
    "(2, 8, 8, 3, 1, 1, 1, 1)",
    "8",
    "()",
    "(1e9,)",
    "(99999999999999999999, 1, 1, 3)",
    "(4, 32768, 32768, 3)",
    "(" + "1, " * 40 + ")",
    "(0, 99999999999, 99999999999, 3)",
]


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    "The bytes of an npz file, half of them sound but for one part at most."
    sound = draw(st.booleans())
    images = np.zeros((draw(st.integers(2, 12)), 8, 8, 3), np.uint8) if sound else draw(pictures())
    n = len(images) if images.ndim else 1
    members = {"images.npy": npy(images), "labels.npy": npy(np.arange(n) % 2 if sound else draw(targets(n)))}
    if draw(st.integers(0, 5 if sound else 2)) == 0:
        names = draw(st.lists(text, max_size=5).map(lambda words: [word[:40] for word in words]) | st.just(["a", "b", "c", "d"]))
        members["classes.npy"] = npy(
            draw(st.sampled_from([np.array(names, str), np.array(names, object), np.arange(len(names)), np.array("a"), np.zeros((2, 2))]))
        )
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(members)))
        how = draw(st.sampled_from(["remove", "lie", "lie", "junk", "rename"]))
        content = members.pop(name)
        if how == "lie":
            members[name] = lie(
                draw(st.sampled_from(SHAPES)), draw(st.sampled_from(["|u1", "<i8", "|O", "<f4", "xss", "|V0", "<U99999999"]))
            )
        elif how == "junk":
            members[name] = draw(st.binary(max_size=40))
        elif how == "rename":
            members[draw(st.sampled_from(["../up.npy", "/etc/up.npy", "images", "IMAGES.npy"]))] = content
    return damage(zipped(members, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))), draw(broken))


def use(name: str, split: str) -> None:
    "Read it as a dataset, and name what would be made of it."
    images = load_dataset(name, split)
    assert images.images.dtype == torch.uint8 and images.images.shape[3] == 3 and len(images.labels) == len(images)
    assert not len(images) or 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(images.classes)
    assert (
        fingerprint(name) and "/" not in slug(name) and weights_of("resnet18", name, "smoke", 0).name.endswith("-resnet18-s0.safetensors")
    )


versions = st.one_of(
    *[st.just("")] * 5,
    st.tuples(st.sampled_from(sorted(CORRUPTIONS)), st.integers(1, 5)).map(lambda pair: f":{pair[0]}:{pair[1]}"),
    text.map(lambda word: f":{word}:3"),
    text.map(lambda word: f":fog:{word}"),
)
LIE = zipped({"images.npy": lie(SHAPES[0]), "labels.npy": npy(np.arange(9))})


@given(archives(), st.one_of(st.none(), archives()), st.sampled_from(["train", "test"]), versions, st.one_of(st.just("own.npz"), filename))
@example(LIE, None, "train", "", "own.npz")
@example(zipped({"images.npy": npy(np.zeros((2, 8, 8, 3), np.uint8)), "labels.npy": npy(np.arange(2))}),
         zipped({"images.npy": npy(np.zeros((2, 8, 8, 3), np.uint8)), "labels.npy": npy(np.int64(1))}), "test", "", "own.npz")
@example(bomb(), None, "train", "", "own.npz")
@example(
    zipped({"images.npy": npy(np.zeros((4, 8, 8, 3), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 2**62]))}),
    None,
    "train",
    "",
    "own.npz",
)
@example(
    zipped({"images.npy": npy(np.zeros((4, 8, 8, 3), np.uint8)), "labels.npy": npy(np.arange(4))}),
    None,
    "test",
    ":fog:" + "9" * 5000,
    "own.npz",
)
@example(zipped({"images": b"x", "labels.npy": npy(np.arange(0))}), None, "train", "", "own.npz")
@example(zipped({"images.npy": lie("(2, 8, 8, 3)"), "labels.npy": lie("(99999999999999999999,)", "<i8")}), None, "train", "", "own.npz")
@example(zipped({"images.npy": npy(np.zeros((2, 8, 8, 3), "S1")), "labels.npy": npy(np.arange(2))}), None, "train", "", "own.npz")
@example(zipped({"images.npy": npy(np.zeros((2, 8, 8, 3), ">i4")), "labels.npy": npy(np.arange(2))}), None, "train", "", "own.npz")
@fuzz(KIND)
def test_arrays(content, other, split, version, name):
    "One file, or two in a folder."
    with ground() as folder:
        if other is None:
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir()
            (folder / name / "train.npz").write_bytes(content)
            (folder / name / "test.npz").write_bytes(other)
        attempt(KIND, lambda: use(f"npz:{folder / name}{version}", split), folder)
