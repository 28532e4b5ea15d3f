"""What names mean, told without torch: networks with settings, versions of datasets, and mistakes that are answered at once."""
import os
import subprocess
import sys

import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.core.names import (
    LIBRARIES,
    Source,
    check_dataset,
    check_names,
    parse_version,
    path_of,
    split_method,
    split_versions,
    torchvision_names,
    unknown_network,
)

# --- methods


@pytest.mark.parametrize(("text", "parts"), [
    ("retrain", ("retrain", "")), (" arachne:search=de; layers=[fc]", ("arachne", "search=de; layers=[fc]")),
    ("my_method:Shift", ("my_method:Shift", "")), ("a.b:Shift:steps=3;rate=0.1", ("a.b:Shift", "steps=3;rate=0.1")),
    ("retrian:epochs=3", ("retrian", "epochs=3")), ("retrain:Class", ("retrain", "Class")), ("a/b.py:Shift", ("a/b.py", "Shift")),
])
def test_a_method_is_a_name_or_a_class_with_settings_behind_it(text, parts):
    assert split_method(text) == parts


def test_a_class_of_ones_own_passes_and_is_looked_for_later():
    check_names(methods=["my_method:Shift:steps=3", "retrain"])
    with pytest.raises(ArchrepairError, match="unknown method 'retrian': did you mean 'retrain'"):
        check_names(methods=["retrian:epochs=3"])


# --- networks


@pytest.mark.parametrize(("text", "source"), [
    ("resnet18", Source("resnet18")), ("timm:resnet18.a1_in1k", Source("timm:resnet18.a1_in1k")),
    ("cifar-resnet20:weights=published", Source("cifar-resnet20", weights="published")),
    ("timm:resnet18:weights=a/b.pt#ema;normalize=0.5/0.25", Source("timm:resnet18", "a/b.pt#ema", "0.5/0.25")),
    ("hub:owner/repo:net:trust=yes", Source("hub:owner/repo:net", trust=True)),
    ("hub:C:\\nets:net:normalize=none;trust=yes", Source("hub:C:\\nets:net", normalize="none", trust=True)),
])
def test_a_name_carries_what_belongs_to_the_network(text, source):
    assert Source.of(text) == source and str(source) == text


@pytest.mark.parametrize(("text", "message"), [
    ("resnet18:weights=", "'weights=' is not a setting of a network; expected weights=FILE"),
    ("resnet18:trust=maybe", "'trust=maybe' is not a setting"), ("resnet18:normalize=none;weihgts=w.pt", "did you mean 'weights'"),
])
def test_other_settings_are_one_line(text, message):
    with pytest.raises(ArchrepairError, match=message):
        Source.of(text)


def test_torchvisions_names_are_those_that_it_lists():
    from torchvision import models

    from archrepair.networks import external

    assert torchvision_names() == sorted(f"torchvision:{name}" for name in models.list_models(module=models))
    assert tuple(external.LIBRARIES) == LIBRARIES


def test_without_torchvisions_sources_there_are_fewer_hints(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert torchvision_names() == []
    assert "did you mean 'resnet18'" in str(unknown_network("resnet-18", ["resnet18", *torchvision_names()]))


# --- datasets


@pytest.mark.parametrize(("name", "parts"), [
    ("cifar10", ("cifar10", None, 0)), ("cifar10:fog:3", ("cifar10", "fog", 3)), ("folder:/a/b", ("folder:/a/b", None, 0)),
    ("folder:/a/b:fog:5", ("folder:/a/b", "fog", 5)), ("npz:a.npz", ("npz:a.npz", None, 0)), ("npz:a.npz:snow:1", ("npz:a.npz", "snow", 1)),
    ("folder:C:\\a", ("folder:C:\\a", None, 0)), ("folder:C:\\a:fog:3", ("folder:C:\\a", "fog", 3)),
    ("npz:D:/b/a.npz", ("npz:D:/b/a.npz", None, 0)), ("folder:/a/b:c,d:snow:2", ("folder:/a/b:c,d", "snow", 2)),
])
def test_parse_version(name, parts):
    assert parse_version(name) == parts


@pytest.mark.parametrize("name", ["cifar10:fog", "cifar10:fog:x", "cifar10:3", "cifar10:", "cifar10:fog:-1", "cifar10:fog:³"])
def test_half_a_version_is_refused(name):
    with pytest.raises(ArchrepairError, match="expected NAME or NAME:CORRUPTION:SEVERITY"):
        parse_version(name)


@pytest.mark.parametrize("name", ["cifar10:fog:9", "folder:/a/b:fog:0", "cifar10:snow:17"])
def test_a_severity_is_checked_before_anything_is_looked_for(name):
    with pytest.raises(ArchrepairError, match=rf"severity of {name} is \d+; expected a whole number from 1 to 5"):
        parse_version(name)


@pytest.mark.parametrize(("text", "versions"), [
    ("digits", ["digits"]), ("digits, digits:fog:3", ["digits", "digits:fog:3"]), ("folder:/a,b/c", ["folder:/a,b/c"]),
    ("folder:/a, b,digits:fog:3", ["folder:/a, b", "digits:fog:3"]), ("npz:a,b.npz,folder:c,d", ["npz:a,b.npz", "folder:c,d"]),
    ("digits,digitz", ["digits", "digitz"]), ("auto", ["auto"]),
])
def test_a_list_of_datasets_is_separated_by_commas_but_not_their_paths(text, versions):
    assert split_versions(text) == versions


@pytest.mark.parametrize(("name", "path"), [("folder:a:b", "a:b"), ("npz:a.npz", "a.npz"), ("folder:", None), ("cifar10", None)])
def test_the_path_in_a_name(name, path):
    assert (str(path_of(name)) if path else path_of(name)) == path


# --- before anything starts


@pytest.mark.parametrize(("names", "message"), [
    ({"models": ["resnet34"]}, "unknown model 'resnet34': did you mean 'torchvision:resnet34'"),
    ({"models": ["resnet18", "vgg61"]}, "unknown model 'vgg61': did you mean 'vgg16'"),
    ({"models": ["resnet18:weights="]}, "not a setting of a network"),
    ({"datasets": ["cifar1"]}, "unknown dataset 'cifar1': did you mean 'cifar10'"),
    ({"datasets": ["digits", "folder:"]}, "unknown dataset 'folder:'"),
    ({"datasets": ["cifar10:smog:3"]}, "unknown corruption 'smog': did you mean 'fog'"),
    ({"datasets": ["cifar10:*:3"]}, "unknown corruption '\\*'"),
    ({"datasets": ["cifar10:fog"]}, "not a version of a dataset"),
    ({"methods": ["retrain", "surgcal:variant=auto-rgn"]}, "unknown method 'surgcal': did you mean 'surgical'"),
])
def test_a_wrong_name_is_told_from_the_name_alone(home, names, message):
    with pytest.raises(ArchrepairError, match=message):
        check_names(**names)


def test_what_only_others_know_passes(home):
    check_names(["resnet18", "timm:whatever", "package.module:factory", "hub:a/b:c", "cifar-resnet20:weights=published"],
                ["auto", "digits:fog:3", "npz:/nowhere.npz", "folder:a:b:snow:1"], ["archrepair:strategy=darts", " retrain"])


def test_a_corruption_of_ones_own_may_lie_among_the_archives(home):
    with pytest.raises(ArchrepairError, match="unknown corruption 'smog'"):
        check_dataset("cifar10:smog:3")
    archive = home / "data" / "CIFAR-10-C"
    archive.mkdir(parents=True)
    (archive / "smog.npy").touch()
    check_dataset("cifar10:smog:3")


def test_a_mixture_is_of_corruptions_that_are_ours(home):
    check_names(datasets=["cifar10:fog+snow:3", "digits:gaussian_noise+clean:1"])
    (home / "data" / "CIFAR-10-C").mkdir(parents=True)
    (home / "data" / "CIFAR-10-C" / "smog.npy").touch()
    for name in ("cifar10:fog+smog:3", "cifar10:clean:3", "cifar10:fog+:3"):
        with pytest.raises(ArchrepairError, match="unknown corruption"):
            check_dataset(name)


MISTAKES = ("train --model resnet_18", "localize --model torchvision", "repair --model resnet34", "repair --method archrepare",
            "repair --dataset digit", "repair --dataset cifar10:smog:3", "repair --strategy x", "repair --tier x", "repair --level neuron",
            "evaluate --dataset digits,fog", "compare --methods retrain,x", "corrupt --dataset x", "corrupt --corruption smog",
            "list blocks --model x", "list nothing", "run nosuch", "paper --models resnet81", "paper --methods x", "repair --nosuch 1",
            "repare")
QUESTIONS = ("--help", "--version", "repair --help", "list methods", "list strategies --json", "list models torchvision:mobile*")


def test_questions_and_mistakes_are_answered_without_torch():
    "All of them in one process: what one of them had imported, the next would find."
    program = """
import sys
from archrepair.cli.app import main
statuses = []
for words in sys.argv[1:]:
    try:
        main(words.split())
        statuses.append(0)
    except SystemExit as end:
        statuses.append(int(end.code or 0))
    if loaded := {"torch", "numpy", "pandas"} & set(sys.modules):
        sys.exit(f"{words}: {loaded}")
print(statuses, file=sys.stderr)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    command = [sys.executable, "-c", program, *QUESTIONS, *MISTAKES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    statuses = [0] * len(QUESTIONS) + [2 if words in ("repair --nosuch 1", "repare") else 1 for words in MISTAKES]
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == str(statuses), done.stderr
