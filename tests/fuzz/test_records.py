"""Folders of repairs and cards of exhibits: files with any content become a page that escapes what it shows, or one line."""

import functools
import json
from html.parser import HTMLParser

from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from archrepair.deploy.card import write_card
from archrepair.deploy.report import read_folder
from archrepair.experiments.cells import Record
from archrepair.paper.index import index
from archrepair.repair.result import load
from support.fuzz import HOSTILE, attempt, broken, command, damage, filename, fuzz, ground, mutate, mutations
from support.reports import RECORD, make, scenario_and_networks

KIND = "records"


@functools.cache
def record() -> dict:
    "The content of a record with everything in it."
    result = make(scenario_and_networks()).to_dict()
    options = [["strategy", "darts"], ["search_options", [["order", 2]]]]
    return json.loads(
        json.dumps(
            {
                "cell": RECORD["cell"] | {"block": None, "options": options},
                "metrics": result.pop("metrics"),
                "repair": result,
                "versions": RECORD["versions"],
            }
        )
    )


CARD = {
    "name": "table5",
    "kind": "table",
    "title": "Accuracy",
    "caption": "Table 5 · of networks",
    "notebook": "03_rq1.ipynb",
    "settings": {"tier": "smoke", "dataset": "digits"},
}


class Page(HTMLParser):
    "What a page is made of."

    def __init__(self, page: str):
        super().__init__()
        self.parts: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.parts |= {name, *(key for key, _ in attributes)}

    handle_startendtag = handle_starttag


def check_page(path) -> None:
    "Nothing that was in a name has become a part of the page."
    page = path.read_text(encoding="utf-8")
    strange = {part for part in Page(page).parts if "xss" in part or part.startswith("on")} | ({"script"} & Page(page).parts)
    assert not strange, strange


def check_card(path) -> None:
    "In Markdown neither."
    for line in path.read_text(encoding="utf-8").splitlines():
        assert "<xss" not in line and "</script>" not in line, line


contents = st.one_of(
    st.tuples(mutations(), broken).map(lambda pair: damage(json.dumps(mutate(record(), pair[0])).encode("ascii"), pair[1])),
    st.binary(max_size=20),
)
hostile = st.sampled_from(
    [word for word in HOSTILE if "<" in word or '"' in word]
    + ["`<xss-e>`", "```\n<xss-f>", "[x](javascript:xss)", "--><xss-g>", "\x85<xss-h>"]
)


KNOWN = {
    "repaired",
    "control",
    "original",
    "conv",
    "unit",
    "none",
    "sep_conv",
    "added",
    "removed",
    "F.relu",
    "clean",
    "keep",
}  # names with a meaning


def replace_texts(content: object, words: list[str]) -> object:
    "The record with one of `words`, numbered, in place of every text without a meaning, wherever it is."
    names: dict[str, str] = {}

    def change(value: object) -> object:
        if isinstance(value, dict):
            items = [(key, change(item)) for key, item in value.items()]
            return {names.get(key, key) if "layer" in key else key: item for key, item in items}
        if isinstance(value, list):
            return [change(item) for item in value]
        if not isinstance(value, str) or value in KNOWN or "/" in value:
            return value
        return names.setdefault(value, f"{words[len(names) % len(words)]}{len(names)}")

    change(content)  # once for the names, which may come as keys before they come as values
    return change(content)


def write(folder, content: bytes, kind: str) -> None:
    "A folder of a repair with this record, or with its repair alone."
    folder.mkdir()
    (folder / ("record.json" if kind == "record" else "repair.json")).write_bytes(content)


@given(contents, filename, st.sampled_from(["record", "record", "repair"]), st.booleans())
@example(b"[]", "run", "record", False)
@example(b'{"cell": {}, "metrics": {}, "repair": {}, "versions": {}}', "run", "record", True)
@example(b"[" * 100_000, "run", "record", False)
@example(json.dumps(record()).encode(), "run\udcff", "record", True)
@example(json.dumps(record()).replace('"accuracy"', '"accurate"').encode(), "run", "record", True)
@fuzz(KIND)
def test_records(content, name, kind, several):
    "The page of one repair, or of two; and what else reads a record."
    with ground() as folder:
        write(folder / name, content, kind)
        write(folder / f"{name}-2", json.dumps(record()).encode(), "record")
        pages = [folder / "page.html"] if several else [folder / name / "report.html"]
        others = [str(folder / f"{name}-2")] if several else []
        options = [*(["--out", str(pages[0])] if several else []), *(["--json"] if len(content) % 2 else [])]
        outcome = command(KIND, ["report", *options, "--", str(folder / name), *others], folder)
        if outcome.line is None:
            check_page(pages[0])
        if kind == "record":
            attempt(KIND, lambda: Record.read(folder / name / "record.json").accuracy(), folder, again=True)
        attempt(KIND, lambda: load(folder / name, nn.Linear(2, 2)), folder, again=True)


@given(st.lists(hostile, min_size=1, max_size=4))
@fuzz(KIND)
def test_pages_escape(words):
    "A sound record whose every text is hostile: the page, the comparison and the model card show it."
    with ground() as folder:
        content = json.dumps(replace_texts(record(), words)).encode()
        write(folder / "a", content, "record")
        write(folder / "b", content, "record")
        assert command(KIND, ["report", str(folder / "a")], folder).line is None
        assert (
            command(KIND, ["report", str(folder / "a"), str(folder / "b"), "--out", str(folder / "page.html")], folder, again=True).line
            is None
        )
        check_page(folder / "a" / "report.html")
        check_page(folder / "page.html")
        (folder / "a" / "repaired.onnx").touch()
        both = read_folder(folder / "a")
        check_card(
            attempt(
                KIND, lambda: write_card(folder / "a", {**both["repair"], "metrics": both["metrics"]}, both["cell"]), folder, again=True
            ).value
        )


def card_of(content: object) -> bytes:
    "A card that keeps its table."
    return json.dumps({**content, "html": "<table><tr><td>1</td></tr></table>"} if isinstance(content, dict) else content).encode()


@given(st.one_of(mutations().map(lambda changes: card_of(mutate(CARD, changes))), st.binary(max_size=20)))
@example(card_of(CARD))
@example(card_of(None))
@fuzz(KIND)
def test_index(content):
    "The page of all exhibits, one of which is strange; its table is HTML by design."
    with ground() as folder:
        (folder / "outputs" / "smoke" / "tables").mkdir(parents=True)
        (folder / "outputs" / "smoke" / "tables" / "table5-resnet18.json").write_bytes(content)
        outcome = attempt(KIND, index, folder)
        if outcome.line is None:
            check_page(outcome.value)
