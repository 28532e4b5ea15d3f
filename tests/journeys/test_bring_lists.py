"""Lists and folders of failures, as registries, spreadsheets and colleagues leave them."""
import pytest

from archrepair import load_dataset, load_failures
from support.bring import Kind, one_line, photos

LISTS = Kind("Failures", "`load_failures(\"failures.csv\", train)`: a list with the columns path, label and, where it is known, predicted. "
                         "Or a folder with a folder per class.")


@pytest.fixture
def failures(here):
    "`failures(text)` reads a list beside photographs, in which CAT and DOG are the names of two pictures; the files and classes taken."
    root = photos(here / "p", train=8, test=8)
    train = load_dataset(f"folder:{root}", "train")
    names = {animal.upper(): sorted((root / "test" / animal).iterdir())[0].name for animal in ("cat", "dog")}

    def read(text: str | bytes, **options) -> list[str]:
        for word, name in names.items():
            text = text.replace(word, name) if isinstance(text, str) else text.replace(word.encode(), name.encode())
        path = root / "test" / "failures.csv"
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text, newline="", **options)
        images = load_failures(path, train)
        assert images.sides == train.sides and images.classes == train.classes
        return [images.classes[y] for y in images.labels]

    return read


TAKEN = {
    "paths with `\\`, as Windows writes them": ("read", "path,label,predicted\ncat\\CAT,cat,dog\n"),
    "lines that end as on Windows or on an old Mac": ("read", "path,label\r\ncat/CAT,cat\r"),
    "blanks after commas, also before quotes": ("left out", '"path", "label", "predicted"\n"cat/CAT", "cat", "dog"\n'),
    "a spreadsheet's byte-order mark, other columns, an index without a name": ("read", "\ufeff,path,label,score\n0,cat/CAT,cat,0.9\n"),
    "classes by number, also as `0.0`, which pandas makes of a column with gaps": ("read", "path,label,predicted\ncat/CAT,0.0,1.0\n"),
    "rows that were right, and rows twice": ("left out", "path,label,predicted\ncat/CAT,cat,\ndog/DOG,dog,dog\ncat/CAT,cat,dog\n"),
}


@LISTS.each("text", TAKEN)
def test_lists(failures, text):
    assert failures(text) == ["cat"]


REFUSED = {
    "semicolons between the columns": (
        "shows the first line, and names the columns expected", "path;label\ncat/CAT;cat\n", r"has no column path \(path;label\)"),
    "a misspelled class": (
        "names row and column, and the class that may be meant",
        "path,label\ncat/CAT,catt\n", "row 2, column label: unknown class 'catt': did you mean 'cat'"),
    "a file that is not there": (
        "names row, column and the path looked at", "path,label\nx.png,cat\n", "row 2, column path: there is no .*x.png"),
    "one image of two classes": ("names both rows", "path,label\ncat/CAT,cat\ncat/CAT,dog\n", "is dog here and cat in row 2"),
    "two columns of one name": ("names it", "path,label,label\ncat/CAT,cat,dog\n", "has two columns label; expected one"),
    "a comma in a path without quotes": ("counts the cells of the row", "path,label\na,b.png,cat\n", "row 2 has 3 cells; expected 2"),
    "an address in place of a path": (
        "asks for a file", "path,label\nhttps://a/b.png,cat\n", "column path: https://a/b.png; expected the path"),
    "the home of somebody who does not exist": (
        "names row and column", "path,label\n~nobody-of-this-name/a.png,cat\n", "row 2, column path: .*~nobody.* cannot be a path"),
    "UTF-16, as a spreadsheet's Unicode text": (
        "asks for UTF-8", "path,label\ncat/CAT,cat\n".encode("utf-16"), "cannot read .*in UTF-8"),
    "no failures at all": ("says so", "path,label,predicted\ncat/CAT,cat,cat\n", "holds no failures"),
}


@LISTS.each("text, pattern", REFUSED, works=False)
def test_lists_with_mistakes(failures, text, pattern):
    with one_line(pattern):
        failures(text)
