"""Whatever a network returns, its logits are found, in eval mode, in train mode and cut in two; or one line says what came instead."""
import copy
import re
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from archrepair.baselines.retrain import Retrain
from archrepair.baselines.surgical import Surgical
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.deploy.export import export_network
from archrepair.networks.blocks import split
from archrepair.networks.outputs import Logits, last_step, logits_of, remark_on
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.localization import localize
from archrepair.training.evaluation import predict
from support.states import same_state

LOGITS, FEATURES = torch.randn(4, 3), torch.randn(4, 8)
Output = namedtuple("Output", "logits aux_logits")
TAKEN = {
    "tensor": LOGITS, "tuple": (LOGITS, FEATURES), "list": [LOGITS], "1×1 map": LOGITS[..., None, None],
    "map first": (LOGITS[..., None, None],),
    "object": SimpleNamespace(logits=LOGITS, loss=None), "mapping": {"features": FEATURES, "logits": LOGITS},
    "ordered": OrderedDict(logits=LOGITS), "named tuple": Output(LOGITS, FEATURES),
}
REFUSED = {
    "a stack": (LOGITS[None], r"a tensor of shape \(1, 4, 3\); expected logits N×classes"),
    "a map": (torch.zeros(4, 3, 8, 8), r"a tensor of shape \(4, 3, 8, 8\);"),
    "loss first": ((torch.tensor(0.5), LOGITS), r"a tuple whose first is a tensor of shape \(\);"),
    "other names": ({"out": LOGITS, "aux": LOGITS}, "a dict with 'out', 'aux';"),
    "object without": (SimpleNamespace(scores=LOGITS), "a SimpleNamespace;"),
    "logits of None": (SimpleNamespace(logits=None), "a SimpleNamespace whose logits are a NoneType;"),
    "nothing": (None, "a NoneType;"), "empty": ((), "a tuple;"), "list of lists": ([[0.1, 0.9]], "a list whose first is a list"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_logits_are_found(kind):
    assert torch.equal(logits_of(TAKEN[kind]), LOGITS)


@pytest.mark.parametrize("output", [LOGITS[:, 0], LOGITS[:, :1], LOGITS[:, :1, None, None], (LOGITS[:, 0], FEATURES),
                                    SimpleNamespace(logits=LOGITS[:, :1])])
def test_one_logit_is_that_of_the_second_of_two_classes(output):
    logits, labels, one = logits_of(output), torch.tensor([0, 1, 1, 0]), LOGITS[:, 0]
    assert torch.equal(logits.argmax(1), (one > 0).long())
    assert torch.allclose(cross_entropy(logits, labels), binary_cross_entropy_with_logits(one, labels.float()))


@pytest.mark.parametrize("kind", REFUSED)
def test_other_outputs_are_one_line(kind):
    output, pattern = REFUSED[kind]
    with pytest.raises(ArchrepairError) as caught:
        logits_of(output)
    assert re.search(pattern, str(caught.value)) and "\n" not in str(caught.value)


class Plain(nn.Module):
    "Two blocks and a head; `outputs` below say what comes out in place of the logits."

    def __init__(self):
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block1, self.block2, self.fc, self.aux = block(3, 8), block(8, 8), nn.Linear(8, 10), nn.Linear(8, 10)
        self.eval()

    def forward(self, x):
        features = self.block2(self.block1(x)).mean((2, 3))
        return self.out(self.fc(features), features)

    def out(self, logits, features):
        return logits


class Object(Plain):
    def out(self, logits, features):
        return SimpleNamespace(logits=logits, loss=None)


class Mapping(Plain):
    def out(self, logits, features):
        return {"logits": logits, "features": features}


class Tuple(Plain):
    def out(self, logits, features):
        return logits, features


class Map(Plain):
    def out(self, logits, features):
        return logits[..., None, None]


class Auxiliary(Plain):
    def out(self, logits, features):
        return (logits, self.aux(features)) if self.training else logits


class Loss(Plain):
    def out(self, logits, features):
        return logits.mean(), logits


KINDS = (Object, Mapping, Tuple, Map, Auxiliary)


@pytest.fixture(scope="module")
def data():
    train, test = load_dataset("digits"), load_dataset("digits:fog:3", "test")
    return RepairData.of(test.select(torch.arange(40)), train.select(torch.arange(120)))


@pytest.fixture(scope="module")
def plain(data):
    "What the network with plain outputs does: predictions, suspicious blocks, and the weights after repairs."
    return observed(Plain(), data)


def observed(model: nn.Module, data: RepairData) -> dict:
    before = copy.deepcopy(model)
    found = {"logits": predict(model, data.failures, data.transform), "votes": localize(model, data, k=10).summary["count"].tolist()}
    searched = ArchRepair(strategy="pc-darts", search_epochs=1, finetune_epochs=1, block="block2")
    for method in (searched, Retrain(epochs=1), Surgical(epochs=1)):
        result = method.repair(model, data)
        found[method.name] = (result.candidates["repaired"].state_dict(), type(result.model))
    assert same_state(before, model)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_gives_the_results_of_plain_logits(plain, data, kind):
    found = observed(kind(), data)
    assert torch.equal(found["logits"], plain["logits"]) and found["votes"] == plain["votes"]
    for name in ("archrepair", "retrain", "surgical"):
        (weights, returned), (expected, _) = found[name], plain[name]
        assert returned is kind and weights.keys() == expected.keys()  # no prefix, no wrapper
        assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in weights.items()), name


@pytest.mark.parametrize("kind", (Plain, *KINDS))
def test_cuts_end_in_logits(kind):
    model, x = kind(), torch.randn(4, 3, 16, 16)
    cut = split(model, "block2", x)
    with torch.no_grad():
        assert cut.prefix is not None or kind is Object  # what is no tensor cannot be recorded
        assert torch.equal(cut.tail()(cut.features(x)), logits_of(model(x)))


@pytest.mark.parametrize("act", [
    lambda data: predict(Loss(), data.failures, data.transform), lambda data: localize(Loss(), data),
    lambda data: ArchRepair().repair(Loss(), data), lambda data: Retrain(epochs=1).repair(Loss(), data),
])
def test_a_loss_before_the_logits_is_refused_at_every_door(data, act):
    with pytest.raises(ArchrepairError, match=r"the network returned a tuple whose first is a tensor of shape \(\); expected logits"):
        act(data)


@pytest.mark.parametrize("kind", [Object, Tuple])
def test_exports_answer_with_logits(tmp_path, kind):
    x = torch.randn(2, 3, 32, 32)
    path = export_network(kind(), tmp_path / "net.pt2", x)
    assert torch.allclose(torch.export.load(path).module()(x), Plain()(x), atol=1e-5)


# --- one logit for two classes, and outputs that are no logits


class One(Plain):
    def __init__(self, end=lambda logit: logit):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.fc, self.end = nn.Linear(8, 1), end

    def out(self, logits, features):
        return self.end(logits).squeeze(1)


@pytest.fixture(scope="module")
def two_classes(data):
    halves = lambda images: ImageSet(images.images, (images.labels > 4).long(), ("low", "high"))
    return RepairData.of(halves(data.failures), halves(data.train))


class Pair(One):
    "The same network, with a zero beside its logit."

    def out(self, logits, features):
        return torch.cat([torch.zeros_like(logits), logits], 1)


def test_a_network_with_one_logit_is_repaired_as_one_with_a_zero_beside_it(two_classes, untouched):
    for method in (ArchRepair(strategy="pc-darts", search_epochs=1, finetune_epochs=1, block="block2"), Retrain(epochs=1)):
        with untouched(One()) as one, untouched(Pair()) as pair:
            results = [method.repair(model, two_classes) for model in (one, pair)]
        weights, expected = (result.candidates["repaired"].state_dict() for result in results)
        assert type(results[0].model) is One and weights.keys() == expected.keys()
        assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in weights.items())
    assert not torch.equal(weights["fc.weight"], One().fc.weight)


def test_one_logit_for_ten_classes_is_one_line(data):
    with pytest.raises(ArchrepairError, match="the network has one output but labels run to 9; expected one output per class"):
        predict(One(), data.train, data.transform)


@pytest.mark.parametrize("act", [lambda m, d: predict(m, d.train, d.transform), lambda m, d: Retrain(epochs=1).repair(m, d)])
def test_one_probability_is_refused_before_it_calls_everything_the_second_class(two_classes, act):
    with pytest.raises(ArchrepairError, match=r"the network's one output is a probability \(a sigmoid at its end\); expected a logit"):
        act(One(torch.sigmoid), two_classes)


def test_a_logit_between_0_and_1_is_none_the_less_a_logit(two_classes):
    logits = predict(One(lambda logit: 0 * logit + 0.5), two_classes.train, two_classes.transform)
    assert logits.unique(dim=0).tolist() == [[0, 0.5]]


@pytest.mark.parametrize(("end", "step"), [
    (nn.Identity(), "Addmm"), (nn.Softmax(1), "Softmax"), (nn.Sequential(nn.Sigmoid(), nn.Flatten(0)), "Sigmoid"),
    (nn.Sequential(nn.LogSoftmax(1), nn.Unflatten(1, (-1, 1, 1))), "LogSoftmax"),
])
def test_the_last_step_is_found_behind_changes_of_shape(end, step):
    network = nn.Sequential(nn.Linear(8, 1 if step == "Sigmoid" else 3), end).requires_grad_(False)
    with torch.inference_mode():
        assert last_step(network, torch.randn(2, 8)) == step


SAID = {
    "probabilities": (LOGITS.softmax(1), 3, "returns probabilities"), "more outputs": (LOGITS, 2, "3 outputs for 2 classes"),
    "logits": (LOGITS, 3, ""), "log-probabilities": (LOGITS.log_softmax(1), 3, ""), "nothing": (LOGITS[:0], 2, ""),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_said_of_outputs(kind):
    logits, classes, remark = SAID[kind]
    assert remark in remark_on(logits, classes) and bool(remark_on(logits, classes)) == bool(remark)


@pytest.mark.parametrize(("model", "remark"), [(lambda: nn.Sequential(Plain(), nn.Softmax(1)), "returns probabilities"),
                                               (lambda: Wide(), "12 outputs for 10 classes")])
def test_a_repair_keeps_what_was_said_of_outputs(data, model, remark):
    for method in (ArchRepair(strategy="pc-darts", search_epochs=0, finetune_epochs=0), Retrain(epochs=0)):
        assert [text for text in method.repair(model(), data).warnings if remark in text]


class Wide(Plain):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 12)


def test_googlenet_learns_by_its_logits_in_train_mode():
    from torchvision.models import googlenet

    with torch.random.fork_rng(devices=[]):
        network = googlenet(num_classes=4, aux_logits=True, init_weights=False).train()
        output = network(torch.randn(2, 3, 96, 96))
    assert not isinstance(output, torch.Tensor) and torch.equal(logits_of(output), output.logits)


def test_logits_module_holds_the_network_itself():
    model = Tuple()
    assert Logits(model).model is model and torch.equal(Logits(model)(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8))[0])
