"""Progress is drawn on standard error, and only where someone watches."""
import pytest

from archrepair.core.progress import spoken, track


def test_nothing_is_drawn_when_nobody_watches(capfd, monkeypatch):
    monkeypatch.delenv("ARCHREPAIR_PROGRESS", raising=False)
    with track("x", 2) as advance:
        advance(loss=1.0)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_standard_error_alone(capfd, monkeypatch):
    monkeypatch.setenv("ARCHREPAIR_PROGRESS", "1")
    with track("counting", 2) as advance:
        advance(loss=0.5)
        advance()
    out, err = capfd.readouterr()
    assert out == "" and "counting" in err and "loss 0.5" in err and "2/2" in err


def test_an_error_inside_is_passed_on():
    with pytest.raises(ZeroDivisionError), track("x", 1):
        raise ZeroDivisionError


def test_times_as_one_says_them():
    assert [spoken(x) for x in (-1, 3, 600, 7200, 1e6, 1e9)] == ["0 s", "3 s", "10 min", "2.0 h", "12 days", "11,574 days"]
