"""Lists of what there is to choose from, and names for the shell."""
import json
import os
import subprocess
import sys

import pytest

from archrepair.cli.listing import KINDS, REGISTRIES, choices, completion_of, names
from archrepair.core.errors import ArchrepairError


def python(program: str, **environment: str) -> str:
    "What a program prints, run in a process of its own."
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert not done.stderr, done.stderr
    return done.stdout


# --- lists

def test_a_list_holds_the_names_of_its_registry():
    for kind, registry in REGISTRIES.items():
        listed = [name for name, _ in choices(kind)]
        assert set(listed) >= registry.keys() and len(set(listed)) == len(listed)
    assert choices("methods")[0][0] == "archrepair"
    others = {"torchvision:NAME", "timm:NAME", "hub:OWNER/REPO:ENTRY", "package.module:factory"}
    assert set(dict(choices("models"))) - REGISTRIES["models"].keys() == others
    assert dict(choices("corruptions"))["fog"].startswith("weather: ")


def test_an_unknown_list_is_answered_with_the_nearest():
    with pytest.raises(ArchrepairError, match="unknown list 'modles': did you mean 'models'"):
        choices("modles")


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_list_needs_no_torch(kind):
    program = f"""
import sys
from archrepair.cli.app import main
try:
    main(["list", "{kind}", "--json"])
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    assert list(json.loads(python(program))) == [name for name, _ in choices(kind)]


# --- the shell

def offered(*words: str) -> set[str]:
    "What the shell is offered when the tab key is pressed after these words, by a process that did not import torch."
    program = """
import sys
from archrepair.cli.app import main
try:
    main([])
finally:
    assert "torch" not in sys.modules
"""
    return set(python(program, COMP_WORDS=" ".join(["archrepair", *words]), COMP_CWORD=str(len(words)),
                      _ARCHREPAIR_COMPLETE="complete_bash").split())


@pytest.mark.parametrize(("words", "expected"), [
    (("repair", "--method", "ar"), {"archrepair", "arachne"}), (("train", "--model", "resnet1"), {"resnet18", "resnet101"}),
    (("repair", "--strategy", "d"), {"darts"}), (("list", "me"), {"methods"}),
    (("compare", "--methods", "archrepair,sur"), {"archrepair,surgical"}), (("corrupt", "--corruption", "f"), {"frost", "fog"}),
    (("train", "--tier", ""), {"smoke", "lite", "paper", "auto"}), (("repo",), {"report"}),
])
def test_the_shell_completes_names_without_torch(words, expected):
    assert offered(*words) == expected


def test_the_shell_is_told_how_to_complete():
    text = python("from archrepair.cli.app import main; main([])", _ARCHREPAIR_COMPLETE="source_bash")
    assert "complete -o" in text and "_ARCHREPAIR_COMPLETE=complete_bash" in text


def test_names_in_forms_are_completed_up_to_the_users_own_part():
    assert {"folder:", "npz:"} <= set(names("datasets")) and not [name for name in names("datasets") if "PATH" in name]
    assert names("lists") == list(KINDS)


def test_only_the_last_of_several_names_is_completed():
    assert completion_of("methods", separated=True)("mode,birdnn,ret") == ["mode,birdnn,retrain"]
    assert completion_of("methods")("mode,ret") == [] and completion_of("tiers", ("auto",))("a") == ["auto"]
