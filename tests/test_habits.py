"""What people expect of a package they know nothing of: pictures of results, their own tensors, types, wheels."""
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

import archrepair
from archrepair import ArchRepair, Normalize, RepairData, create_model, localize
from archrepair.core.errors import ArchrepairError
from archrepair.data.arrays import as_images, as_pixels, as_sets
from archrepair.data.images import ImageSet
from archrepair.deploy.card import CARD, MARK, model_card, write_card
from archrepair.deploy.export import export_network
from archrepair.deploy.footprint import footprints
from support import ROOT
from support.finished import finished
from support.reports import Checked, make

# --- pictures

def test_results_show_themselves_in_a_notebook(parts, monkeypatch):
    result = make(parts, block="<b>x</b>", verdict="accepted: <img src=x onerror=alert(1)> & so on")
    result.localization.warnings.append("<script>y</script>")
    shown = [result.localization._repr_html_(), result.genotype._repr_html_(), result.genotype.graph._repr_html_(), result._repr_html_()]
    for text in shown:
        page = Checked(text)
        assert not page.all("script") and not page.all("i") and "://" not in text and "onerror=" not in "".join(map(str, page.seen))
        assert "prefers-color-scheme: dark" in text and 'class="archrepair"' in text
        assert all(a.get("aria-label") for a in page.all("svg"))
    assert "layer<1>" in Checked(shown[0]).words and "<script>y</script>" in Checked(shown[0]).words
    assert "0 to 1 original" in shown[1] and "sep conv" in shown[1] and len(Checked(shown[1]).all("svg")) == 1
    said = Checked(shown[3]).words
    assert "Accept: <img src=x onerror=alert(1)> & so on." in said and "Held out" in said and "repaired ← returned" in said
    bare = make(parts, genotype=None, localization=None, candidates={}, metrics={}, history={}, warnings=[])
    assert "Accept" in Checked(bare._repr_html_()).words


def test_a_long_list_of_blocks_is_held_to_those_that_lead(parts):
    import pandas as pd

    found = make(parts).localization
    names = [f"layer{i}" for i in range(40)]
    counts = [i % 7 for i in range(40)]
    summary = pd.DataFrame({"size": 3, "count": counts, "per_neuron": 0.1, "expected": 1.0, "enrichment": 1.0, "p": 0.5, "gradient": 0.1, "s_hat": 0.1},
                           index=names)
    many = type(found)(**{**found.__dict__, "block": "layer7", "blocks": names, "summary": summary})
    leading = many.leading(12)
    assert len(leading) == 12 and "layer7" in leading and leading == sorted(leading, key=names.index)
    assert min(summary.loc[[n for n in leading if n != "layer7"], "count"]) >= max(summary.loc[[n for n in names if n not in leading], "count"])
    assert len(many.plot(most=12).patches) == 12 and "16 more blocks are not shown" in many._repr_html_()


def test_a_result_comes_back_from_its_dictionary(parts):
    result = make(parts)
    result.footprint = {"before": {"parameters": 3}, "after": {"parameters": 4}}
    plain = json.loads(json.dumps(result.to_dict()))
    plain["localization"]["summary"] = {b: {"size": 1, "count": 1, "expected": 1.0, "p": None} for b in plain["localization"]["blocks"]}
    again = archrepair.RepairResult.from_dict(plain)
    assert again.genotype == result.genotype and again.cost == result.cost and again.footprint == result.footprint and not again.candidates
    assert again.localization.verdict.startswith("layer<1> holds 1 of the 2") and again.to_dict()["changed"] == result.changed
    for broken in ({}, {**plain, "cost": {"miles": 3}}, {**plain, "genotype": {"graph": 1}}):
        with pytest.raises(ArchrepairError, match="genotype|saved repair") as error:
            archrepair.RepairResult.from_dict(broken)
        assert "\n" not in str(error.value)


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


def test_a_footprint_counts_and_leaves_the_networks_alone(untouched):
    small, large = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, n), torch.nn.Linear(n, 2)) for n in (2, 200))
    with untouched(small), untouched(large):
        found = footprints(small, large, torch.zeros(5, 3, 2, 2))
    assert found["before"]["parameters"] == 12 * 2 + 2 + 2 * 2 + 2 and found["after"]["bytes"] == 4 * found["after"]["parameters"]
    assert found["before"]["flops"] == 2 * (12 * 2 + 2 * 2) and found["after"]["milliseconds"] > 0


# --- model cards

def test_a_card_lies_beside_every_saved_network():
    folder = finished() / "outputs" / "repair"
    text, record = (folder / CARD).read_text(), json.loads((folder / "record.json").read_text())
    after = record["metrics"]["after"]["held_out"]
    assert f"| {after['n']} | " in text and f"{after['accuracy']:.2f} % ({after['low']:.2f}–{after['high']:.2f})" in text
    for said in ("# resnet18, repaired on digits:brightness:5", "seed 0", record["repair"]["block"], "## Limits", "archrepair.load('repair', network)",
                 "training images", "ms an image", f"{record['repair']['footprint']['after']['parameters']:,}"):
        assert said in text, said


def test_a_card_lies_beside_every_exported_network_and_its_code_works(tmp_path, parts):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    export_network(network, tmp_path / "a.pt2", torch.zeros(1, 3, 2, 2))
    text = (tmp_path / CARD).read_text()
    assert "# Sequential\n" in text and "Nothing is known here" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    here, space = Path.cwd(), {}
    os.chdir(tmp_path)
    try:
        exec(code, space)
    finally:
        os.chdir(here)
    assert torch.equal(space["repaired"](torch.ones(4, 3, 2, 2)), network(torch.ones(4, 3, 2, 2)))
    result = make(parts)
    write_card(tmp_path, result.to_dict(), {"model": "a|b", "dataset": "x"})
    text = (tmp_path / CARD).read_text()
    assert "# a\\|b, repaired on x" in text and "beware of &lt;i&gt;this&lt;/i&gt;" in text and "'a.pt2'" in text
    (tmp_path / CARD).write_text("mine")
    write_card(tmp_path, {})
    assert (tmp_path / CARD).read_text() == "mine"


def test_a_card_of_a_repair_without_test_images():
    text = model_card({"method": "m", "block": None, "verdict": "accepted", "changed": {}, "metrics": {}})
    assert text.startswith(MARK) and "accuracy elsewhere is unknown" in text and "nan" not in text


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
