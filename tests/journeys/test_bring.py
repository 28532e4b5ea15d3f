"""The tables of what people bring are whole, and the guide page shows all of them."""
import importlib.util

import pytest

from support import ROOT
from support.bring import ORDER, kinds

KINDS = kinds()


def test_every_table_is_in_the_guide():
    assert {path.stem.removeprefix("test_bring_") for path in (ROOT / "tests" / "journeys").glob("test_bring_*.py")} == set(ORDER)
    assert len({kind.title for kind in KINDS}) == len(KINDS) and all(kind.rows for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_rows_are_told_apart_and_written_alike(kind):
    assert len({row.brings for row in kind.rows}) == len(kind.rows)
    assert not [row for row in kind.rows for text in (row.brings, row.happens) if not text or text.endswith(".") or "\n" in text]


def test_the_guide_shows_every_row():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    page = pages.bring().lower()
    rows = [(row.brings, "works" if row.works else "one&nbsp;line", row.happens) for kind in KINDS for row in kind.rows]
    assert not [row for row in rows if f"| {' | '.join(row)} |".lower() not in page] and len(rows) > 100
    assert f"of the {len(rows)} rows" in page and "{{bring}}" in (ROOT / "docs" / "bring.md").read_text(encoding="utf-8")
