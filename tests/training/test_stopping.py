"""Who is asked to stop, and who answers."""
import pytest

from archrepair.training.stopping import StopRequest


def test_nobody_answers_outside_of_a_training():
    stop = StopRequest()
    assert not stop.ask(SystemExit(75)) and stop.error is None
    with stop.answered():
        pass
    assert not stop.ask(SystemExit(75))


def test_a_request_is_raised_in_the_end_and_does_not_stay():
    stop, error = StopRequest(), SystemExit(75)
    with pytest.raises(SystemExit) as caught, stop.answered():
        assert stop.ask(error) and stop.error is error
    assert caught.value is error and stop.error is None


def test_another_error_goes_before():
    stop = StopRequest()
    with pytest.raises(ValueError), stop.answered():
        stop.ask(SystemExit(75))
        raise ValueError
    assert stop.error is None and not stop.ask(SystemExit(75))


def test_a_file_that_is_written_says_so():
    stop = StopRequest()
    with pytest.raises(OSError), stop.saving():
        assert stop.is_saving
        raise OSError
    assert not stop.is_saving
