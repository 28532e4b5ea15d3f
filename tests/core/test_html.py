"""Elements that are well-formed and escaped, whatever the names are."""
from hypothesis import given
from hypothesis import strategies as st

from archrepair.core.html import figure, join, section, table, tag
from support.reports import Checked


@given(st.text())
def test_any_text_survives_the_way_into_a_page(text):
    page = Checked(tag("p", text, title=text))
    assert "".join(page.text) == text and page.seen == [("p", {"title": text})]


def test_elements():
    assert tag("p", "a", None, tag("b", 1), class_="x", aria_label="y", id=None) == '<p class="x" aria-label="y">a<b>1</b></p>'
    assert section("Nothing", None, "") == "" and join("<", tag("b")) == "&lt;<b></b>"
    assert Checked(table("none", (), [])).all("thead") == []


def test_figures_take_their_colors_from_the_page():
    drawn = figure("f", lambda ax: ax.plot([0, 1], color="#0173b2"), (3, 2), "caption", 'a "line"')
    page = Checked(drawn)
    assert "var(--blue)" in drawn and "var(--ink)" in drawn and "#0173b2" not in drawn and page.all("svg")[0]["aria-label"] == 'a "line"'
