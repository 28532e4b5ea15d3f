"""Words of the command line as values."""
import pytest

from archrepair.cli.options import read_settings, split_names, trusted
from archrepair.core.errors import ArchrepairError
from archrepair.repair.archrepair import search_settings


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("layer1", ["layer1"]), ("layer1, layer2 ", ["layer1", "layer2"])])
def test_names_are_separated_by_commas(text, expected):
    assert split_names(text) == expected


@pytest.mark.parametrize(("word", "expected"), [
    ("inherited_lr=1e-3", {"inherited_lr": 1e-3}), ("edge_norm=no", {"edge_norm": False}), ("select=off", {"select": "off"}),
    ("max_skip=null", {"max_skip": None}), ("order=2", {"order": 2}), ("order=fd", {"order": "fd"}), ("max_skip=0o17", {"max_skip": 15}),
    ("unheard_of=no", {"unheard_of": "no"}), (" widen = full ", {"widen": "full"}),
])
def test_settings_of_a_search_are_read_as_what_they_are(word, expected):
    assert read_settings([word], "setting", "-S a=3", search_settings("pc-darts")) == expected


@pytest.mark.parametrize(("word", "expected"), [
    ("a=3", {"a": 3}), ("a=false", {"a": False}), ("a=b=c", {"a": "b=c"}), ("a=", {"a": ""}), ("a=[1, x]", {"a": [1, "x"]}),
])
def test_values_are_read_as_yaml(word, expected):
    assert read_settings([word], "setting", "-S a=3") == expected


def test_no_words_are_no_settings():
    assert read_settings(None, "setting", "-S a=3") == read_settings([], "setting", "-S a=3") == {}


@pytest.mark.parametrize(("word", "message"), [
    ("a", "'a' is not a setting; expected NAME=VALUE, e.g. -S a=3"), ("=3", "'=3' is not a setting; expected NAME=VALUE"),
    ("a=[1", r"the value of setting a: '\[1' is not valid YAML: .*; quote it, e.g. -S a="),
])
def test_other_words_get_one_clear_line(word, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        read_settings(["b=1", word], "setting", "-S a=3")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("model", "trust", "expected"), [
    ("hub:a/b:net", True, "hub:a/b:net:trust=yes"), ("hub:a/b:net", False, "hub:a/b:net"), ("resnet18", True, "resnet18"),
    ("hub:a/b:net:weights=published", True, "hub:a/b:net:weights=published;trust=yes"), ("hub:a:b:trust=yes", True, "hub:a:b:trust=yes"),
])
def test_a_trusted_network_is_called_so(model, trust, expected):
    assert trusted(model, trust) == expected
