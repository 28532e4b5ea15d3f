"""Errors in one line, and files whole or not at all."""
import json
import math
import os

import pytest
import torch

from archrepair.core.errors import (
    ArchrepairError,
    NoFailures,
    Notice,
    TrainingDiverged,
    first_line,
    first_sentence,
    note,
    unknown,
    write_atomic,
    write_json,
    write_text,
)


def test_one_family():
    assert issubclass(NoFailures, ArchrepairError) and issubclass(TrainingDiverged, ArchrepairError)


def test_unknown_puts_the_nearest_first_and_lists_the_rest():
    text = str(unknown("model", "resnet_18", ["vgg16", "resnet18", "resnet50"]))
    assert "did you mean 'resnet18'?" in text and "vgg16, resnet18, resnet50" in text and "\n" not in text


def test_unknown_does_not_guess_wildly_and_shortens_long_lists():
    text = str(unknown("block", "zzz", [f"layer{i}" for i in range(30)]))
    assert "did you mean" not in text and "layer23" in text and "layer24" not in text and "6 more" in text


def test_unknown_survives_a_generator_and_an_empty_registry():
    assert "b" in str(unknown("x", "c", (n for n in "ab")))
    assert "unknown x" in str(unknown("x", "c", []))


@pytest.mark.parametrize(("error", "expected"), [(OSError("a\nb"), "a"), (EOFError(), "EOFError"), (KeyError("k"), "'k'")])
def test_first_line(error, expected):
    assert first_line(error) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("Weights only load failed. This file can still be loaded.\nMore", "Weights only load failed"),
    ("\x1b[31mred\x1b[0m and torch.nn.Linear. Next", "red and torch.nn.Linear"),
    ("one two three", "one two …"), ("", "str"),
])
def test_first_sentence_ends_at_a_word(text, expected):
    assert first_sentence(text, 12 if text.startswith("one") else 160) == expected


def test_a_note_is_a_notice_of_the_callers_caller():
    def load():
        note("w.pt: prefix module. removed")

    with pytest.warns(Notice, match="^w.pt: prefix module. removed$") as caught:
        load()
    assert caught[0].filename == __file__


def test_write_atomic_makes_folders_and_returns_the_path(tmp_path):
    path = write_atomic(tmp_path / "a" / "b" / "x.json", lambda p: p.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_write_atomic_keeps_the_suffix_that_writers_look_at(tmp_path):
    seen = []
    write_atomic(tmp_path / "x.npz", lambda p: (seen.append(p), p.write_bytes(b"1")))
    assert seen[0].suffix == ".npz" and seen[0].parent == tmp_path and seen[0].name != "x.npz"


@pytest.mark.parametrize("problem", [ZeroDivisionError, KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, problem):
    path = tmp_path / "record.json"
    path.write_text("old")

    def half(p):
        p.write_text("ha")
        raise problem("stop")

    with pytest.raises(ArchrepairError if problem is OSError else problem):
        write_atomic(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["record.json"]


WRITERS = {"text": lambda p: p.write_text("x"), "torch": lambda p: torch.save({}, p),
           "safetensors": lambda p: __import__("safetensors.torch").torch.save_file({"a": torch.zeros(1)}, p)}


@pytest.mark.parametrize("writer", WRITERS)
def test_unwritable_places_are_the_users_to_mend(tmp_path, writer):
    (tmp_path / "file").write_text("in the way")
    places = [tmp_path / "file" / "x.pt", *([__import__("pathlib").Path("/proc/self/x.pt")] if os.path.isdir("/proc/self") else [])]
    for place in places:
        with pytest.raises(ArchrepairError, match="cannot write") as caught:
            write_atomic(place, WRITERS[writer])
        assert "\n" not in str(caught.value) and str(place) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_writing_onto_a_folder_is_refused_and_the_folder_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArchrepairError, match="cannot write"):
        write_atomic(tmp_path / "out", lambda p: p.write_text("x"))
    assert os.listdir(tmp_path) == ["out"]


def test_text_and_json_are_written_whole_and_read_back(tmp_path):
    path = write_text(tmp_path / "deep" / "page.html", "ünïcode\n")
    assert path.read_text(encoding="utf-8") == "ünïcode\n"
    content = {"accuracy": 0.5, "name": "ü", "p": math.nan}
    for ensure_ascii in (True, False):
        path = write_json(tmp_path / "record.json", content, ensure_ascii=ensure_ascii)
        text = path.read_text(encoding="utf-8")
        assert text.endswith("}\n") and text.isascii() == ensure_ascii and text.count("\n") == 5
        assert math.isnan(json.loads(text)["p"]) and json.loads(text)["name"] == "ü"
    with pytest.raises(TypeError):
        write_json(path, {"network": object()})
    assert path.read_text(encoding="utf-8") == text and os.listdir(tmp_path / "deep") == ["page.html"]
