"""Progress is drawn on standard error, and only where someone watches."""
import pytest

from archrepair.core.progress import track


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
