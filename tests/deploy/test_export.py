"Files that run without this package, and answer as the network does."
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError, Notice
from archrepair.deploy.export import EXPORTS, export_network, input_of
from archrepair.networks.blocks import replace_block
from support.families import discretized, network, run, walk

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def repaired(name: str, position: int, widen: str = "keep", group: int = 1) -> nn.Module:
    "A network with a searched block, k = 2."
    place = list(walk([name], group=group))[position]
    return replace_block(place.model, place.name, discretized(place, 1, 2, widen)[1]).eval()


CASES = [("resnet18", 2, "keep", 1), ("vgg16", 1, "slice", 1)]
SLOW = [("efficientnet_b0", 1, "full", 1), ("resnet50", 1, "keep", 1), ("resnet101", 0, "slice", 1), ("densenet121", 3, "keep", 1),
        ("densenet121", 3, "full", 2)]


def exported(case, suffix, folder) -> None:
    model = repaired(*case)
    path = export_network(model, folder / "deep" / f"network{suffix}", IMAGES[:1])  # a single image is example enough
    expected = run(model, IMAGES)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(["MODEL_CARD.md", f"network{suffix}"])
    if suffix == ".pt2":
        forward = torch.export.load(path).module()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert isinstance(session.get_inputs()[0].shape[0], str) and session.get_inputs()[0].shape[1:] == [3, 32, 32]
        forward = lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    for n in (1, 2, 6):
        assert torch.allclose(forward(IMAGES[:n]), expected[:n], atol=1e-4 * float(expected.abs().max())), n


@pytest.mark.parametrize("case", CASES)
def test_a_program_takes_batches_of_any_size(case, tmp_path):
    exported(case, ".pt2", tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_onnx_takes_batches_of_any_size(case, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    exported(case, ".onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize("case", SLOW)
def test_every_network_exports_in_both_formats(case, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    exported(case, suffix, tmp_path)


PIXELS = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
AS_INPUT = PIXELS.permute(0, 3, 1, 2) / 255
EXAMPLES = {  # what is given, and what it is taken as
    "pixels": (PIXELS, AS_INPUT), "an array": (PIXELS.numpy(), AS_INPUT), "turned around": (PIXELS.flip(1).numpy()[:, ::-1], AS_INPUT),
    "colors first": (PIXELS.permute(0, 3, 1, 2), AS_INPUT), "one image": (PIXELS[0], AS_INPUT[[0, 0]]),
    "grey": (PIXELS[..., :1], AS_INPUT[:, :1]),
    "inputs": (IMAGES[:3], IMAGES[:3]), "one input": (IMAGES[0], IMAGES[[0, 0]]), "a batch of one": (IMAGES[:1], IMAGES[[0, 0]]),
    "double": (IMAGES[:2].double(), IMAGES[:2]), "with gradients": (IMAGES[:2].clone().requires_grad_(), IMAGES[:2]),
    "vectors": (torch.ones(4, 7), torch.ones(4, 7)),
}
NO_EXAMPLES = {"labels": (torch.zeros(2, dtype=torch.int64), r"of type int64 \(2,\)"), "nothing": (None, "of type NoneType"),
               "no image": (IMAGES[:0], r"of type float32 \(0, 3, 32, 32\)"), "a path": ("cat.png", "of type str")}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_are_taken_as_inputs(kind):
    example, expected = EXAMPLES[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = input_of(example)
    assert given.dtype == torch.float32 and torch.equal(given, expected)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, Notice)]
    is_pixels = expected.shape[1] in (1, 3) and float(expected.max()) <= 1 and "uint8" in str(example.dtype)
    takes = "the file takes float B×" + "×".join(map(str, expected.shape[1:]))
    notice = f"images are taken as an example of the input's shape: {takes}, normalized as the network expects it"
    assert said == [notice] * is_pixels


@pytest.mark.parametrize("kind", NO_EXAMPLES)
def test_what_is_no_example_is_one_line(kind, tmp_path):
    example, pattern = NO_EXAMPLES[kind]
    with pytest.raises(ArchrepairError, match=f"the example is {pattern}; expected network inputs, float B×C×H×W, or images, uint8"):
        export_network(network("resnet18"), tmp_path / "n.pt2", example)


def test_pixels_give_the_file_that_inputs_give(tmp_path):
    model = network("resnet18")
    path = export_network(model, tmp_path / "n.pt2", PIXELS)
    assert torch.allclose(torch.export.load(path).module()(IMAGES), run(model, IMAGES), atol=1e-5)
    with pytest.raises(ArchrepairError, match=r"ResNet does not run on inputs of 1×32×32 \(RuntimeError: .*\); expected inputs"):
        export_network(model, tmp_path / "grey.pt2", PIXELS[..., :1])


def test_a_network_whose_answers_depend_on_the_batch_is_compared_batch_by_batch(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_network(model, tmp_path / "n.pt2", IMAGES)
    assert torch.allclose(torch.export.load(tmp_path / "n.pt2").module()(IMAGES[:4]), run(model, IMAGES[:4]), atol=1e-5)


ALONE = """
import sys
sys.modules["archrepair"] = None  # importing it is an error
import torch

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError(f"unpickled {arguments}")

sys.addaudithook(refuse)
logits = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2], weights_only=True))
assert not any(name.startswith("archrepair.") for name in sys.modules)
torch.save(logits.detach(), sys.argv[3])
"""


def test_a_program_runs_without_this_package(tmp_path):
    model = repaired("resnet18", 2)
    export_network(model, tmp_path / "n.pt2", IMAGES)
    torch.save(IMAGES, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("n.pt2", "x.pt", "y.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "y.pt"), run(model, IMAGES), atol=1e-5)


LOADED = """
import sys, torch
from archrepair.nas.genotype import Genotype
from archrepair.networks.models import create_model
from archrepair.networks.weights import load_weights
model = create_model("resnet18", 10, width=0.125, stem_stride=2)
model.layer3 = Genotype.from_json(open(sys.argv[1]).read()).build(model.layer3)
load_weights(model, sys.argv[2]).eval()(torch.zeros(1, 3, 32, 32))
print(sorted(m for m in sys.modules if m.startswith("archrepair.")))
"""


def test_a_repaired_network_needs_nothing_of_the_search(tmp_path):
    place = list(walk(["resnet18"]))[2]
    genotype, block = discretized(place, 1, 2, "keep")
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    torch.save(replace_block(place.model, place.name, block).state_dict(), tmp_path / "weights.pt")
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "genotype.json"), str(tmp_path / "weights.pt")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(eval(done.stdout))
    assert "archrepair.nas.genotype" in loaded
    assert not [name for name in loaded if name.startswith(("archrepair.repair", "archrepair.training", "archrepair.nas.strateg"))
                or name == "archrepair.nas.supernet"]


def test_the_network_is_left_alone(tmp_path, untouched):
    model = repaired("resnet18", 2).train()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    with untouched(model):
        export_network(model, tmp_path / "n.pt2", IMAGES[:2])


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        y = self.fc(x.mean((2, 3)))
        return y if y.sum() > 0 else -y


class Forgetful(nn.Module):
    "Exporters remember what a number was when they looked."

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3)) + self.calls


@pytest.mark.parametrize("model, name, message", [
    (network("resnet18"), "network.h5", "network.h5; expected a name that ends in .pt2 or .onnx"),
    (network("resnet18"), "network", ".pt2 or .onnx"),
    (Moody(), "network.pt2", r"Moody cannot be exported to .pt2 \(.*\); its weights can be saved all the same"),
    (Forgetful(), "network.pt2", "the exported Forgetful answers differently"),
])
def test_what_cannot_be_exported_is_said_in_one_line(model, name, message, tmp_path):
    with pytest.raises(ArchrepairError, match=message) as error:
        export_network(copy.deepcopy(model), tmp_path / name, IMAGES)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnxruntime"])
def test_a_missing_extra_is_named(missing, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ArchrepairError, match=rf"needs {missing}: pip install 'archrepair\[export\]'"):
        export_network(network("vgg16"), tmp_path / "n.onnx", IMAGES)
    assert not list(tmp_path.iterdir())
