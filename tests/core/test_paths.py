"""Home is the environment's, else the checkout's, else the current folder."""
import pytest

from archrepair.core.paths import find_root, home


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A folder that looks like a checkout of archrepair, with two folders in it."
    monkeypatch.delenv("ARCHREPAIR_HOME", raising=False)
    folder = tmp_path / "checkout"
    (folder / "nbs" / "tutorials").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n")
    return folder


def test_a_checkout_is_found_from_any_depth(checkout, monkeypatch):
    for folder in (checkout, checkout / "nbs", checkout / "nbs" / "tutorials"):
        assert find_root(folder / "any.ipynb") == checkout
        monkeypatch.chdir(folder)
        assert home() == checkout


def test_a_nearer_checkout_wins_and_another_projects_settings_do_not(checkout):
    (checkout / "nbs" / "settings.ini").write_text("[DEFAULT]\nlib_name = fastai\n")
    assert find_root(checkout / "nbs" / "any.ipynb") == checkout
    (checkout / "nbs" / "settings.ini").write_text("[DEFAULT]\nlib_name=archrepair\n")
    assert find_root(checkout / "nbs" / "any.ipynb") == checkout / "nbs"


def test_settings_that_cannot_be_read_are_passed_over(checkout):
    (checkout / "nbs" / "settings.ini").write_bytes(b"\xff\xfe\x00lib_name")
    (checkout / "nbs" / "tutorials" / "settings.ini").mkdir()
    assert find_root(checkout / "nbs" / "tutorials" / "any.ipynb") == checkout


def test_without_a_checkout_home_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ARCHREPAIR_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_root(tmp_path / "any.ipynb") is None and home() == tmp_path


def test_the_environment_comes_first_unless_it_is_empty(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("ARCHREPAIR_HOME", "")
    assert home() == checkout
