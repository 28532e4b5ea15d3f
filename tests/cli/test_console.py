"""Tables and JSON on standard output, words on standard error."""
import io
import json
import math
import sys
import warnings

import pytest

from archrepair.cli.console import print_json, replace_unencodable, say, saying_notices, show, without_nan
from archrepair.core.errors import note


def test_a_table_shows_two_digits_and_text_as_it_is(capsys):
    show("accuracy on cifar10:fog:3", ["network", "accuracy %", "n"], [["[b]before[/b]", 66.4, 597], [":cloud:", 71.5, 3]])
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "accuracy on cifar10:fog:3" and not err
    assert all(text in out for text in ("[b]before[/b]", ":cloud:", "66.40", "71.50", "597"))


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "?2, 3?3 ?"), ("cp1252", "§2, 3×3 ?"), ("utf-8", "§2, 3×3 😀")])
def test_what_a_terminal_cannot_show_becomes_a_question_mark(monkeypatch, encoding, shown):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    replace_unencodable()
    show("§2, 3×3 😀", ["größe", "95 % ± σ"], [["naïve", 1.0]])
    say("§2, 3×3 😀")
    for stream in streams:
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding).splitlines()[0] == shown
    assert "1.00" in streams[0].buffer.getvalue().decode(encoding)


def test_a_stream_that_keeps_the_bytes_of_names_is_left_so(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw on Windows
    replace_unencodable()
    assert stream.errors == "surrogateescape"


def test_words_leave_standard_output_alone(capsys):
    say("report: a.html")
    assert capsys.readouterr() == ("", "report: a.html\n")


def test_json_has_no_number_that_is_not_finite(capsys):
    content = {"rate": math.nan, 3: [math.inf, (1.5, -math.inf)], "text": "NaN"}
    assert without_nan(content) == {"rate": None, "3": [None, [1.5, None]], "text": "NaN"}
    print_json(content)
    assert json.loads(capsys.readouterr().out) == without_nan(content)


def test_notices_are_lines_said_once_and_other_warnings_stay_warnings(capsys):
    with pytest.warns(RuntimeWarning, match="other"), saying_notices():
        for text in ("one", "two", "one"):
            note(text)
        warnings.warn("other", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "note: one\nnote: two\n")
    with saying_notices():
        note("one")  # once per command, not once for all
    assert capsys.readouterr().err == "note: one\n"
