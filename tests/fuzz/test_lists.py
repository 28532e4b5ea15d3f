"""Lists of failures: tables in any encoding, with any delimiter, that name any path."""

import functools
import io

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from archrepair.data.failures import load_failures
from archrepair.data.images import ImageSet
from support.fuzz import HOSTILE, attempt, broken, damage, fuzz, ground, text

KIND = "lists"
CLASSES = ("cat", "dog", "1", "a,b", "<xss-a>")


@functools.cache
def like() -> ImageSet:
    return ImageSet(np.zeros((5, 8, 8, 3), np.uint8), torch.arange(5), CLASSES, "photos/train")


@functools.cache
def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(file, "png")
    return file.getvalue()


def furnish(folder) -> None:
    "Images, links, a file that is not an image, and one above the folder of the list."
    (folder / "data" / "in").mkdir(parents=True)
    for name in ("up.png", "data/a.png", "data/in/b.png", "data/a b.png", "data/ü.png", "data/a,b.png"):
        (folder / name).write_bytes(png())
    (folder / "data" / "text.png").write_text("text")
    (folder / "data" / "link.png").symlink_to("a.png")
    (folder / "data" / "loop.png").symlink_to("loop.png")


paths = st.one_of(
    st.sampled_from(
        [
            "a.png",
            "a.png",
            "in/b.png",
            "in\\b.png",
            "../up.png",
            "../../up.png",
            "../../../../../../etc/passwd",
            "a b.png",
            "ü.png",
            "a,b.png",
            "text.png",
            "link.png",
            "loop.png",
            "in",
            "./a.png",
            "in/../a.png",
            "/dev/null",
            "/proc/self/mem",
            "file:///a.png",
            "http://a/b.png",
            "C:\\a.png",
            "~/up.png",
            "data/in/b.png",
            "a.png ",
        ]
    ),
    text,
)
labels = st.one_of(st.sampled_from(["cat", "dog", "1", "0", "4", "5", "Cat", " cat ", "a,b", "<xss-a>", "007", "1.0", "-0"]), text)
rows = st.lists(st.one_of(st.tuples(paths, labels), st.tuples(paths, labels, labels), st.lists(text, max_size=4)), max_size=5)
heads = st.one_of(
    st.sampled_from(
        [("path", "label")] * 4
        + [("path", "label", "predicted")] * 4
        + [
            ("Path ", "LABEL"),
            ("label", "path"),
            ("path", "path", "label"),
            ("\ufeffpath", "label"),
            ("path",),
            (),
            ("file", "class"),
            ("path", "label", "label"),
        ]
    ),
    st.lists(text, max_size=4),
)


def quoted(cell: str, how: str) -> str:
    return (
        f'"{cell}"' if how == "all" else '"' + cell.replace('"', '""') + '"' if how == "needed" and set(cell) & set(',;\t"\r\n') else cell
    )


GOOD = ["a.png", "in/b.png", "in\\b.png", "../up.png", "a b.png", "ü.png", "a,b.png", "link.png", "~/up.png", "./in/../a.png"]


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    "The bytes of a table, half of them sound but for one cell at most."
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=80))
    if draw(st.booleans()):
        lines = draw(st.lists(st.tuples(st.sampled_from(GOOD), st.sampled_from(CLASSES[:4])), min_size=1, max_size=4))
        if draw(st.booleans()):
            lines[0] = draw(st.one_of(st.tuples(paths, st.just("cat")), st.tuples(st.just("a.png"), labels)))
        return "".join(f"{quoted(path, 'needed')},{quoted(label, 'needed')}\n" for path, label in [("path", "label"), *lines]).encode(
            "utf-8", "surrogateescape"
        )
    delimiter, ending, quotes = (
        draw(st.sampled_from([",", ",", ",", ",", ";", "\t", "|", ", "])),
        draw(st.sampled_from(["\n", "\r\n", "\r"])),
        draw(st.sampled_from(["needed", "needed", "all", "none"])),
    )
    lines = [delimiter.join(quoted(cell, quotes) for cell in row) for row in (draw(heads), *draw(rows))]
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1", "utf-32", "cp037"]))
    content = ending.join(lines) + draw(st.sampled_from(["", ending, ending * 3, '"', "\0", "\x1a"]))
    return damage(content.encode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "replace"), draw(broken))


def table_of(*cells: str) -> bytes:
    "A table of one row."
    return f"path,label\n{','.join(cells)}\n".encode("utf-8", "surrogateescape")


@given(tables())
@example(table_of("a.png", "9" * 5000))
@example(table_of("~no-such-user/a.png", "cat"))
@example(table_of("a" * 300, "cat"))
@example(table_of("x/" * 2500, "cat"))
@example(table_of("a\0.png", "cat"))
@example(table_of("../../../../etc/passwd", "cat"))
@example(table_of("a.png", "\x1b[31mred"))
@example(table_of("a" * 200_000, "cat"))
@fuzz(KIND)
def test_lists(content):
    with ground() as folder:
        furnish(folder)
        (folder / "data" / "list.csv").write_bytes(content)
        outcome = attempt(KIND, lambda: load_failures(folder / "data" / "list.csv", like()), folder)
        if outcome.line is None:
            failures = outcome.value
            assert failures.images.shape[1:] == (8, 8, 3) and failures.classes == CLASSES and 0 < len(failures) <= 5


def test_paths():
    "Paths that nobody has."
    for path in sorted({*HOSTILE, "a" * 5000} - {"/"}):  # which would be looked through as a whole
        with ground() as folder:
            attempt(KIND, functools.partial(load_failures, path, like()), folder, again=True)
