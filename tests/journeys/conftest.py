"""An empty folder to bring things to, and commands run in it."""
import functools
import json
from types import SimpleNamespace

import pytest
import torch

from archrepair.core.errors import note_once
from archrepair.experiments.originals import original
from support.finished import command


@pytest.fixture
def here(home, monkeypatch):
    "An empty folder, in which the test begins and which is its home; what is said once in a process has not been said yet."
    note_once.cache_clear()
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def evaluate(here, capsys):
    "`evaluate(options, …)` runs the command at the smoke tier: accuracy in per cent, number of images, and what was said."
    def run(*options: object) -> SimpleNamespace:
        capsys.readouterr()
        status = command("evaluate", "--tier", "smoke", "--json", *options)
        out, err = capsys.readouterr()
        assert status == 0 and "Traceback" not in err, err
        score, = json.loads(out).values()
        return SimpleNamespace(accuracy=score["accuracy"], n=score["n"], said=err)

    return run


@pytest.fixture(scope="session")
def trained_weights(tmp_path_factory):
    "`trained_weights()` is a copy of the state dict of the original that `archrepair train` makes of digits at the smoke tier."
    @functools.cache
    def once() -> dict[str, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ARCHREPAIR_HOME", str(tmp_path_factory.mktemp("originals")))
            return original("resnet18", "digits", "smoke").network.state_dict()

    return lambda: {name: value.clone() for name, value in once().items()}
