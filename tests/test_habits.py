"""What people expect of a package they know nothing of: wildcards, their own tensors, completion, JSON, types, wheels."""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from typer.main import get_command

import archrepair
from archrepair import ArchRepair, Normalize, RepairData, create_model, list_models, localize
from archrepair.cli import listing
from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError
from archrepair.data.arrays import as_images, as_pixels, as_sets
from archrepair.data.images import ImageSet
from support import ROOT
from support.finished import command

# --- names

def test_models_are_listed_by_pattern():
    assert archrepair.list_models("resnet*") == ["resnet18", "resnet50", "resnet101"] and len(list_models()) == 6
    found = list_models("torchvision:mobilenet_v3*")
    assert found == ["torchvision:mobilenet_v3_large", "torchvision:mobilenet_v3_small"] and not list_models("nothing*")
    with pytest.raises(ArchrepairError, match="library"):
        list_models("torchvison:*")


@pytest.mark.parametrize("what", ["models", "datasets", "corruptions", "methods", "strategies", "tiers"])
def test_names_for_the_shell_are_those_of_the_registry(what):
    from archrepair.core.tiers import TIERS
    from archrepair.corruptions.catalogue import CORRUPTIONS
    from archrepair.data.datasets import DATASETS
    from archrepair.experiments.methods import METHODS
    from archrepair.nas.strategies import STRATEGIES
    from archrepair.networks.models import MODELS

    registry = {"models": MODELS, "corruptions": CORRUPTIONS, "methods": METHODS, "strategies": STRATEGIES, "tiers": TIERS,
                "datasets": [name.removesuffix("PATH") for name in DATASETS]}[what]
    assert sorted(listing.names(what)) == sorted(registry)


def pressed(*words: str) -> list[str]:
    "What the shell is offered when the tabulator is pressed after these words."
    environment = {**os.environ, "COMP_WORDS": " ".join(["archrepair", *words]), "COMP_CWORD": str(len(words)), "_ARCHREPAIR_COMPLETE": "complete_bash"}
    code = ("import sys\nfrom archrepair.cli.app import main\ntry:\n    main([])\nfinally:\n    assert 'torch' not in sys.modules, 'slow'")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "slow" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("words", "offered"), [
    (("repair", "--method", "ar"), {"archrepair", "arachne"}), (("train", "--model", "resnet1"), {"resnet18", "resnet101"}),
    (("repair", "--strategy", "d"), {"darts"}), (("list", "me"), {"methods"}), (("compare", "--methods", "archrepair,sur"), {"archrepair,surgical"}),
    (("train", "--tier", ""), {"smoke", "lite", "paper", "auto"}), (("repo",), {"report"}),
])
def test_the_shell_completes_names_without_torch(words, offered):
    assert set(pressed(*words)) == offered


def test_the_shell_is_told_how_to_complete():
    done = subprocess.run([sys.executable, "-c", "from archrepair.cli.app import main; main([])"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "_ARCHREPAIR_COMPLETE": "source_bash"})
    assert "complete -o" in done.stdout and "_ARCHREPAIR_COMPLETE=complete_bash" in done.stdout


def test_every_command_speaks_json():
    commands = get_command(app).commands
    assert {"train", "localize", "repair", "evaluate", "compare", "corrupt", "list", "run", "report"} <= commands.keys()
    assert not [name for name, one in commands.items() if not any("--json" in parameter.opts for parameter in one.params)]


# --- one's own images

def pixels(n: int = 24, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


class Photos(Dataset):
    "As torchvision's: PIL images, and names of the classes."
    classes = ["cat", "dog", "owl"]

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return Image.fromarray(pixels()[i]), i % 3


LABELS = np.arange(24) % 3
FORMS = {
    "numpy": (pixels(), LABELS), "list of labels": (pixels(), LABELS.tolist()), "uint8 N×H×W×3": (torch.from_numpy(pixels()), torch.from_numpy(LABELS)),
    "uint8 N×3×H×W": (torch.from_numpy(pixels()).permute(0, 3, 1, 2), LABELS),
    "float N×3×H×W": (torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255, LABELS),
    "half": (torch.from_numpy(pixels()).permute(0, 3, 1, 2).double() / 255, torch.from_numpy(LABELS).int()),
    "float N×H×W×3": (pixels().astype(np.float32) / 255, LABELS), "PIL dataset": Photos(), "subset": Subset(Photos(), range(24)),
    "tensor dataset": TensorDataset(torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(LABELS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form):
    found = as_images(FORMS[form])
    assert torch.equal(found.images, torch.from_numpy(pixels())) and found.labels.tolist() == LABELS.tolist() and found.labels.dtype == torch.int64
    assert found.classes == (("cat", "dog", "owl") if form in ("PIL dataset", "subset") else ("0", "1", "2"))


@pytest.mark.parametrize("form", FORMS)
def test_a_repair_set_from_every_form(form):
    data = RepairData.of(FORMS[form], FORMS["numpy"], transform=Normalize(), classes=["a", "b", "c"])
    same = RepairData.of(*2 * [ImageSet(pixels(), LABELS, ("a", "b", "c"))], transform=Normalize())
    for part in ("failures", "train", "val", "val_failures"):
        assert torch.equal(getattr(data, part).images, getattr(same, part).images) and getattr(data, part).classes == ("a", "b", "c")
    assert len(RepairData.of(FORMS[form], FORMS["numpy"], FORMS["numpy"]).val) == 24


def test_gray_images_get_three_channels():
    gray = torch.arange(32, dtype=torch.uint8).view(2, 4, 4, 1)
    three = as_pixels(gray)
    assert three.shape == (2, 4, 4, 3) and torch.equal(three[..., 0], gray[..., 0]) and torch.equal(three[..., 0], three[..., 2])
    assert torch.equal(as_pixels(gray.permute(0, 3, 1, 2)), three) and torch.equal(as_pixels(gray.permute(0, 3, 1, 2) / 255), three)
    assert torch.equal(as_images(TensorDataset(gray[..., 0], torch.tensor([0, 1]))).images, three)


def test_sets_agree_on_their_classes():
    sets = as_sets({"failures": (pixels(3), [1, 0, 1]), "train": (pixels(), LABELS)})
    assert sets["failures"].classes == sets["train"].classes == ("0", "1", "2")
    assert as_sets({"failures": (pixels(3), [1, 0, 1]), "train": Photos()})["failures"].classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(("source", "message"), [
    ((pixels()[..., 0], LABELS), r"failures: images are uint8 \(24, 8, 8\)"), ((pixels()[0], LABELS), "images are uint8"),
    ((pixels().astype(np.int64), LABELS), "images are int64"), ((pixels(), LABELS[:5]), "one integer an image"),
    ((pixels(), LABELS + 0.5), "one integer an image"), ((pixels(), LABELS - 1), "labels run from -1"),
    ((torch.randn(24, 3, 8, 8), LABELS), r"float images run from .* expected 0 to 1: give them before normalization"),
    ((torch.full((2, 3, 8, 8), torch.nan), [0, 1]), "float images run from nan"),
    (pixels(), "failures are a ndarray; expected"), ("images.npz", "failures are a str; expected"), (None, "failures are a NoneType; expected"),
    (TensorDataset(torch.zeros(3, 3, 8, 8)), r"expected a pair \(image, label\)"), (TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)), "is empty"),
    ([(pixels()[0], 0), (pixels()[1], 1), (pixels()[2], 1)], "failures are a list; expected"),
])
def test_what_cannot_be_taken_is_said_in_a_line(source, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        RepairData.of(source, FORMS["numpy"])
    assert "\n" not in str(error.value)


def test_images_of_many_sizes_are_refused():
    class Mixed(Photos):
        def __getitem__(self, i):
            return Image.new("RGB", (8 + i % 2, 8)), 0

    with pytest.raises(ArchrepairError, match="item 1 is 8×9 px and item 0 is 8×8.*resize"):
        as_images(Mixed())


def test_other_data_is_refused_before_any_work(problem):
    for act in (lambda data: localize(problem.network, data), lambda data: ArchRepair(search_epochs=0).repair(problem.network, data),
                lambda data: archrepair.search(problem.network, "layer4", data), lambda data: archrepair.finetune(problem.network, data, where="layer4")):
        with pytest.raises(ArchrepairError, match=r"data is a Photos; expected RepairData: RepairData.of"):
            act(Photos())


# --- devices and types

def test_devices_are_strings_or_torchs_own(problem):
    one, two = (localize(problem.network, problem.scenario.data, device=device) for device in ("cpu", torch.device("cpu")))
    assert one.to_dict() == two.to_dict()
    assert next(create_model("resnet18", 10, width=0.125, device=torch.device("meta")).parameters()).device.type == "meta"
    from archrepair.experiments.originals import pick_device

    assert pick_device(torch.device("cpu")) == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ArchrepairError, match="device"):
        pick_device("gpu")


def test_types_are_torchs_own(problem):
    assert next(create_model("resnet18", 10, width=0.125, dtype=torch.float64).parameters()).dtype == torch.float64
    data = problem.scenario.data
    assert localize(problem.network, data, precision=torch.float32).to_dict() == localize(problem.network, data, precision="fp32").to_dict()
    assert localize(problem.network, data, precision=torch.bfloat16).settings["precision"] == "bf16"
    with pytest.raises(ArchrepairError, match="unknown precision 'torch.float16'"):
        localize(problem.network, data, precision=torch.float16)
    doubled = create_model("resnet18", 10, width=0.125, stem_stride=2, dtype=torch.float64)
    for act in (lambda: localize(doubled, data), lambda: ArchRepair(search_epochs=0, block="layer4").repair(doubled, data)):
        with pytest.raises(ArchrepairError, match="holds float64 weights; expected float32"):
            act()


# --- as a package

def test_types_are_checked():
    "mypy over the modules that pyproject.toml names, among them every one that defines a public name."
    checked = {Path(file).stem for file in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]}
    assert set(archrepair._WHERE.values()) <= checked
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]


def test_wheel_and_sdist_build_and_install(tmp_path):
    "Into an environment of their own, without dependencies: the package is imported, and the command is there."
    source = tmp_path / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "archrepair", source / "archrepair", ignore=shutil.ignore_patterns("__pycache__"))
    run = lambda *words, **more: subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=200, **more).stdout
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source)  # the wheel is built from the sdist
    wheel, = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"archrepair/py.typed", "archrepair/cli.py", "archrepair/baselines/mode.py"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "nbs", "build"))]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    where = run(python, "-c", "import archrepair; print(archrepair.__file__, archrepair.__version__)", cwd=tmp_path).split()
    assert where[0].startswith(str(tmp_path / "env")) and where[1] == archrepair.__version__
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    out = run(tmp_path / "env" / "bin" / "archrepair", "list", "tiers", "--json", cwd=tmp_path, env={**os.environ, "PYTHONPATH": libraries})
    assert set(json.loads(out)) == {"smoke", "lite", "paper"}


def test_papers_beside_the_code():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    said = configparser.ConfigParser(delimiters=["="], interpolation=None)
    said.read(ROOT / "settings.ini", encoding="utf-8")
    assert cited["version"] == said["DEFAULT"]["version"] == archrepair.__version__ and cited["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["title"].startswith("ArchRepair: Block-Level") and cited["cff-version"] == "1.2.0"
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert [p.stem for p in templates] == ["bug", "new_dataset", "new_method", "new_model"]
    for path in templates:
        head = yaml.safe_load(path.read_text().split("---")[1])
        assert {"name", "about"} <= head.keys()
        for title in re.findall(r'CONTRIBUTING.md, "(.*?)"', path.read_text()):
            assert f"## {title}\n" in guide
    for name in re.findall(r"`(tests/\w+\.py|nbs/lib/\w+\.ipynb)`", guide):
        assert (ROOT / name).exists() or "NAME" in name, name


def test_the_command_says_what_there_is(capsys):
    assert command("list", "models", "resnet*", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["resnet18", "resnet50", "resnet101"]
