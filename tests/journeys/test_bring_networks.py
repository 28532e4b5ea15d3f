"""Networks as their authors wrote them: repaired as the plain network would be, or one line says why not, before any work."""
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.utils.parametrizations as parametrizations
from torch import nn

import archrepair
from archrepair import ImageSet, Normalize, RepairData, export_network, predict
from archrepair.baselines.retrain import Retrain
from support.bring import Kind, Net, assert_same_outcome, foggy, one_line, ordinary, repair
from support.finished import command
from support.states import state_of

OUTPUTS = Kind("What networks return", "A network maps a batch of images to one logit per class. This is what else is understood, at every "
                                       "door.")
MODULES = Kind("What networks are made of", "`ArchRepair().repair(network, data)`, `--model package.module:factory` and `--model "
                                            "timm:NAME`. The network that comes in is never changed.")
AROUND = Kind("What is set around the call", "Modes and types that are global to torch.")


@pytest.fixture(scope="module")
def plain():
    "The repair of the plain network."
    return repair(Net())


# --- outputs


class Object(Net):
    def out(self, logits, features):
        return SimpleNamespace(logits=logits, loss=None)


class Mapping(Net):
    def out(self, logits, features):
        return {"features": features, "logits": logits}


class Pair(Net):
    def out(self, logits, features):
        return logits, features


class Map(Net):
    def out(self, logits, features):
        return logits[:, :, None, None]


RETURNED = {
    "an object with `logits`, as Hugging Face's classifiers do": ("its logits count", Object),
    "a mapping with `logits`": ("its logits count", Mapping),
    "a pair (logits, features)": ("the first counts", Pair),
    "logits of shape N×C×1×1": ("flattened", Map),
}


@OUTPUTS.each("network", RETURNED)
def test_outputs(plain, network):
    assert torch.equal(predict(network(), foggy(), Normalize()), predict(Net(), foggy(), Normalize()))
    result = repair(network())
    assert_same_outcome(result, plain)
    assert type(result.model) is network


class Auxiliary(Net):
    "Inception and GoogLeNet are like this."

    def out(self, logits, features):
        return (logits, self.auxiliary(features)) if self.training else logits


@OUTPUTS.works("auxiliary logits in train mode alone, as Inception's", "left out: trained by its logits")
def test_auxiliary_outputs():
    result, expected = (Retrain(epochs=1).repair(network, RepairData.of(foggy(), ordinary())) for network in (Auxiliary(), Net()))
    assert_same_outcome(result, expected)
    assert torch.equal(result.candidates["repaired"].auxiliary.weight, Net().auxiliary.weight)


@OUTPUTS.works("the same, trained from the command line", "trained, and judged")
def test_auxiliary_outputs_of_a_factory(here, capsys):
    Path("auxiliary_net.py").write_text(
        "from torch import nn\n\n\nclass Auxiliary(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
        "        unit = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())\n"
        "        self.block1, self.block2, self.one, self.two = unit(3, 8), unit(8, 8), nn.Linear(8, n), nn.Linear(8, n)\n\n"
        "    def forward(self, x):\n        f = self.block2(self.block1(x)).mean((2, 3))\n"
        "        return (self.one(f), self.two(f)) if self.training else self.one(f)\n\n\n"
        "def net(num_classes):\n    return Auxiliary(num_classes)\n")
    words = ("--model", "auxiliary_net:net", "--dataset", "digits", "--tier", "smoke", "--json")
    assert command("train", *words, "--out", "w.safetensors") == 0
    trained = json.loads(capsys.readouterr().out)
    assert command("evaluate", *words, "--weights", "w.safetensors") == 0
    assert trained["n"] == 597 and json.loads(capsys.readouterr().out)["digits"]["accuracy"] == trained["accuracy"]


def halves(images: ImageSet) -> ImageSet:
    "The same with two classes."
    return ImageSet(images.images, (images.labels > 4).long(), ("low", "high"))


class Squeezed(Net):
    "One logit for two classes, N×1 or squeezed to N."

    def __init__(self, squeeze: bool = True):
        super().__init__(1)
        self.squeeze = squeeze

    def out(self, logits, features):
        return logits[:, 0] if self.squeeze else logits


@OUTPUTS.works("one logit for two classes, N×1 or N", "its sign decides")
@pytest.mark.parametrize("squeeze", [True, False])
def test_one_logit(squeeze):
    data = RepairData.of(halves(foggy()), halves(ordinary()))
    logits = predict(Squeezed(squeeze), halves(foggy()), data.transform)
    with torch.no_grad():
        expected = Squeezed()(data.transform(foggy().images)) > 0
    assert logits.shape == (60, 2) and torch.equal(logits.argmax(1), expected.long())
    assert repair(Squeezed(squeeze), data).block


@OUTPUTS.works("a thousand outputs, for ten classes", "output i is class i, answers beyond them are wrong; said")
def test_more_outputs_than_classes():
    result = repair(Net(1000))
    assert result.model.classifier.out_features == 1000 and any("1,000 outputs" in warning for warning in result.warnings)


class Softmax(Net):
    def out(self, logits, features):
        return logits.softmax(1)


@OUTPUTS.works("probabilities: a softmax at the end", "the answers are the same; losses say little, which is said")
def test_probabilities():
    assert torch.equal(predict(Softmax(), foggy(), Normalize()).argmax(1), predict(Net(), foggy(), Normalize()).argmax(1))
    assert any("probabilities" in warning for warning in repair(Softmax()).warnings)


class Loss(Net):
    def out(self, logits, features):
        return logits.mean(), logits


@OUTPUTS.one_line("a loss before the logits, or nothing that has the shape of logits", "says what came, and what is expected")
def test_a_loss_first():
    for act in (lambda: predict(Loss(), foggy(), Normalize()), lambda: repair(Loss())):
        with one_line(r"the network returned a tuple whose first is a tensor of shape \(\); expected logits"):
            act()


# --- modules


def normed(norm, *layers: str) -> Net:
    network = Net()
    for name in layers:
        norm(network.get_submodule(name))
    return network


CONVOLUTIONS = [name for name, module in Net().named_modules() if isinstance(module, nn.Conv2d)]
PARAMETRIZED = {
    "`weight_norm` on a convolution": (
        "neurons are weighed by the gradients of their activations, which is said",
        lambda: normed(parametrizations.weight_norm, "block3.3")),
    "`spectral_norm` on all convolutions": ("in the same way", lambda: normed(parametrizations.spectral_norm, *CONVOLUTIONS)),
}


@MODULES.each("make", PARAMETRIZED)
def test_parametrized_weights(untouched, make):
    with untouched(make().eval()) as network:
        result = repair(network)
    expected = repair(network, grad="activation")
    assert_same_outcome(result, expected)
    assert result.localization.summary["count"].equals(expected.localization.summary["count"])


@MODULES.works("`nn.DataParallel`, on a machine without a GPU", "the plain network inside is repaired")
def test_data_parallel(plain, here):
    result = repair(nn.DataParallel(Net()))
    assert_same_outcome(result, plain)
    assert type(result.model) is Net and type(result.save("out")) is not None
    assert type(archrepair.load("out", Net())) is Net


@MODULES.works("a compiled network", "the plain network inside is repaired: files and exports know nothing of the compiler")
def test_compiled(plain, here):
    result = repair(torch.compile(Net(), backend="eager"))
    assert_same_outcome(result, plain)
    assert type(result.model) is Net and not [name for name in result.model.state_dict() if "_orig_mod" in name]
    result.save("out")
    x = torch.randn(2, 3, 32, 32)
    for start in (Net(), torch.compile(Net(), backend="eager")):
        assert torch.equal(archrepair.load("out", start)(x), result.model(x))


class Extra(Net):
    "Keeps more in its state dict than tensors."

    def get_extra_state(self):
        return {"lr": 0.1}

    def set_extra_state(self, state):
        pass


@MODULES.works("a network with extra state (`get_extra_state`)", "repaired, saved and loaded; files hold tensors alone")
def test_extra_state(plain, here):
    result = repair(Extra())
    assert_same_outcome(result, plain)
    result.save("out")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(archrepair.load("out", Extra())(x), result.model(x))


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        return self.dequant(self.classifier(self.block1(self.quant(x)).mean((2, 3))))


@MODULES.one_line("a quantized network", "names a quantized module, and what to repair instead")
def test_quantized(monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")
    network = Quantizable().eval()
    network.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(network, inplace=True)
    network(torch.randn(2, 3, 32, 32))
    quantization.convert(network, inplace=True)
    with one_line("is quantized .*repair the float network"):
        repair(network)


@MODULES.works("a network for gray images, and images in color", "given their luminance, which is said")
def test_gray_network():
    timm = pytest.importorskip("timm")
    for network in (Net(channels=1), timm.create_model("test_resnet", num_classes=10, in_chans=1)):
        result = repair(network.eval())
        assert result.block and next(m for m in result.model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1


@MODULES.works("the same, from the command line", "trained and repaired")
def test_gray_network_of_a_factory(here):
    Path("gray_net.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    unit = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())\n"
        "    return nn.Sequential(unit(1, 8), unit(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n")
    words = ("--model", "gray_net:net", "--dataset", "digits", "--tier", "smoke")
    assert command("repair", *words, "--out", "r", "--search-epochs", 0, "--finetune-epochs", 1) == 0
    assert json.loads(Path("r/record.json").read_text())["metrics"]["after"]["held_out"]["n"] > 200


@MODULES.works("a factory whose network is trained already", "taken as it is: nothing is trained")
def test_trained_factory(here, evaluate):
    torch.save(Net().state_dict(), "w.pt")
    Path("trained_net.py").write_text("import torch\nfrom support.bring import Net\n\n\ndef net():\n    network = Net()\n"
                                      "    network.load_state_dict(torch.load('w.pt'))\n    return network\n")
    digits = archrepair.load_dataset("digits", "test")
    correct = predict(Net(), digits, Normalize.of(archrepair.load_dataset("digits"))).argmax(1) == digits.labels
    score = evaluate("--model", "trained_net:net", "--dataset", "digits")
    assert score.accuracy == pytest.approx(100 * correct.float().mean().item(), abs=0.01)


@MODULES.works("images as the example of an export, in place of the network's input", "taken for the shape of the input, which is said")
def test_export_of_images(here):
    path = export_network(Net(), "net.pt2", ordinary().images[:2])
    x = Normalize()(foggy().images[:5])
    with torch.no_grad():
        assert torch.allclose(torch.export.load(path).module()(x), Net()(x), atol=1e-4)


# --- around the call


@contextlib.contextmanager
def no_gradients():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextlib.contextmanager
def doubles():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "gradients that are switched off": ("the same repair; they are off afterwards", no_gradients),
    "inference mode": ("the same repair", torch.inference_mode),
    "float64 as the default type": ("the same repair, in float32", doubles),
}


@AROUND.each("mode", MODES)
def test_modes(plain, mode):
    network, data = Net(), RepairData.of(foggy(), ordinary())
    before = state_of(network)
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        result = repair(network, data)
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    assert_same_outcome(result, plain)
    after = state_of(network)
    assert before["modes"] == after["modes"] and all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
