"""Everything on a GPU that is not there: nothing is left on the other device, and no step of a training waits for it."""
import copy
import json
import math

import pytest
import torch
from torch import nn

import archrepair.core.progress as progress
from archrepair import ArchRepair, corrupt, create_model, evaluate, finetune, localize, search
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import CORRUPTIONS, METHODS, STRATEGIES
from archrepair.core.tiers import TIERS
from archrepair.data.scenario import RepairData, build_scenario
from archrepair.experiments.methods import method_class
from archrepair.experiments.originals import pick_device
from archrepair.networks.admission import device_of
from archrepair.repair.result import load
from archrepair.training.evaluation import predict
from archrepair.training.fit import Recipe, _Run, fit, train_original
from archrepair.training.rows import Rows, cache_features, image_features
from support.finished import DATASET, command, furnish
from support.memory import fits_only
from support.pretended_gpu import DeviceTensor, PretendedGPU
from support.states import same_state

QUICK: dict[str, dict] = {  # a training of one epoch, and no more than it takes to go through every line
    "archrepair": {"blocks": ["layer2", "layer3"], "finetune_epochs": 1, "failure_views": 1, "control": False,
                   "search_options": {"trial_images": 30}},
    "mode": {"epochs": 1, "rounds": 1, "round_epochs": 1},
    "birdnn": {"epochs": 1}, "arachne": {"population": 6, "iterations": 2, "positives": 40}, "fewshot": {"epochs": 1, "candidates": 2},
    "apricot": {"epochs": 1, "reduced": 2, "subset": 0.2, "sweeps": 1, "retrain_epochs": 1},
}
ONCE_A_BATCH = {"sensei"}  # which images it searches depends on what the network says of them


@pytest.fixture
def room(home):
    "A home with the trained original; made before there is a GPU."
    return furnish(home, repaired=False)


@pytest.fixture
def gpu():
    with PretendedGPU() as device:
        yield device


@pytest.fixture
def epochs(gpu, monkeypatch):
    "For each epoch that is trained, how often the host waited in it, by place."
    waits, train_epoch = [], _Run.train_epoch

    def counted(run, *args):
        before = gpu.waits.copy()
        entry = train_epoch(run, *args)
        waits.append(gpu.waits - before)
        return entry

    monkeypatch.setattr(_Run, "train_epoch", counted)
    return waits


@pytest.fixture(scope="module")
def few(_problem, digits, digits_test):
    "A repair of 160 training images."
    return build_scenario(digits, digits_test, _problem.correct, n_failures=40, n_train=160, transform=_problem.transform)


@pytest.fixture
def network(_problem):
    return copy.deepcopy(_problem.network).to("cuda")


@pytest.fixture(scope="module")
def wide():
    "A network without layers for which the CPU's channels-last kernels are wrong (`core.layout`): there it computes as on a GPU."
    return create_model("resnet18", 10, width=0.25, stem_stride=2)


def on_cpu(network: nn.Module) -> dict:
    return {name: value.cpu() for name, value in network.state_dict().items()}


def is_on_gpu(network: nn.Module) -> bool:
    return all(isinstance(value, DeviceTensor) for value in (*network.parameters(), *network.buffers()))


# --- the GPU itself


def test_it_refuses_what_a_gpu_refuses(gpu):
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.device == torch.device("cuda", 0) and pick_device() == torch.device("cuda")
    for mix in (lambda: x + y, lambda: y.add_(x), lambda: torch.cat([x, y]), lambda: y[x.long()], lambda: nn.Linear(3, 2)(x)):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert torch.equal((x + torch.tensor(1.0)).cpu(), y + 1) and (x[torch.arange(2)] * 2).tolist() == [2, 2]


def test_it_counts_what_the_host_waits_for(gpu):
    x = torch.arange(4.0, device="cuda")
    assert not gpu.waits
    for wait in (lambda: float(x.sum()), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.cpu(), lambda: torch.ones(2).to("cuda"),
                 lambda: torch.tensor([1, 2], device="cuda"), lambda: bool(x[0] > 1)):
        gpu.waits.clear()
        wait()
        assert sum(gpu.waits.values()) == 1
    gpu.waits.clear()
    (x * 2).sum().sqrt_().clamp(min=0), torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert not gpu.waits


def test_it_learns_what_the_cpu_learns(wide, few):
    recipe, results = Recipe(epochs=2, lr=0.05, batch_size=32), []
    for device in ("cpu", "cuda"):
        with PretendedGPU():
            network = copy.deepcopy(wide).to(device)
            history = fit(network, Rows([image_features(few.data.train, few.data.transform, device)]), recipe)
            results.append((on_cpu(network), [entry["loss"] for entry in history.epochs]))
    assert results[0][1] == results[1][1] and all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


# --- every method


@pytest.mark.parametrize("name", [*METHODS, *(f"archrepair:{strategy}" for strategy in STRATEGIES if strategy != "measured")])
def test_a_repair(name, gpu, epochs, network, few, _problem):
    method, _, strategy = name.partition(":")
    kind = method_class(method)
    lengths = {"search_epochs": 1, "finetune_epochs": 1, "epochs": 1, "block": "layer3" if strategy else None, "strategy": strategy or None}
    settings = {field: value for field, value in lengths.items() if field in kind.__dataclass_fields__ and value is not None}
    before = on_cpu(network)
    data = _problem.dark.subset(160) if name == "archrepair" else few.data  # failures without a pattern get no expert
    result = kind(**settings | ({} if strategy else QUICK.get(method, {}))).repair(network, data)
    assert is_on_gpu(result.model) and all(is_on_gpu(candidate) for candidate in result.candidates.values())
    assert all(torch.equal(before[key], value) for key, value in on_cpu(network).items())
    assert len(epochs) >= (0 if method == "arachne" else 1)
    allowed = 2 + (method in ONCE_A_BATCH) * math.ceil((len(data.train) + len(data.failures)) / Recipe(1).batch_size)
    assert [waits for waits in epochs if sum(waits.values()) > allowed] == []
    json.dumps(result.to_dict())


def test_a_repair_of_a_layer(gpu, network, few):
    result = ArchRepair(strategy="pc-darts", level="layer", search_epochs=1, finetune_epochs=1).repair(network, few.data)
    assert is_on_gpu(result.candidates["repaired"]) and "conv" in result.block


def test_verbs_give_what_they_give_on_the_cpu(wide, few):
    "In float32 the pretended GPU computes with the same numbers."
    results = []
    for device in ("cpu", "cuda"):
        with PretendedGPU():
            network = copy.deepcopy(wide).to(device)
            found = search(network, "layer3", few.data, strategy="pc-darts", epochs=1)
            tuned = finetune(network, few.data, level="neuron", where="layer4.1.conv2:3", epochs=1)
            results.append((localize(network, few.data).to_dict(), found.genotype, found.history[0]["loss"], on_cpu(tuned.model),
                            evaluate(network, few).scores))
    cpu, cuda = results
    assert cpu[:3] == cuda[:3] and cpu[4] == cuda[4] and all(torch.equal(cpu[3][key], cuda[3][key]) for key in cpu[3])


# --- waiting


def test_an_epoch_waits_once_however_many_steps_it_has(gpu, epochs, network, few):
    for batch_size in (80, 16):
        fit(network, Rows([image_features(few.data.train, few.data.transform, "cuda")]), Recipe(epochs=2, batch_size=batch_size))
    assert [sum(waits.values()) for waits in epochs] == [1, 1, 1, 1]


def test_progress_is_read_once_a_second(gpu, epochs, network, few, monkeypatch, capfd):
    monkeypatch.setenv("ARCHREPAIR_PROGRESS", "1")
    monkeypatch.setattr(progress.time, "monotonic", lambda: 5.0)
    fit(network, Rows([image_features(few.data.train, few.data.transform, "cuda")]), Recipe(epochs=1, batch_size=8))
    assert [sum(waits.values()) for waits in epochs] == [2]
    assert "20/20" in capfd.readouterr().err


def test_a_prediction_waits_for_its_answers_alone(gpu, network, few):
    rows = image_features(few.data.train, few.data.transform, "cuda")
    gpu.waits.clear()
    assert predict(network, rows, batch_size=10).device.type == "cpu"
    assert sum(gpu.waits.values()) == 1


@pytest.mark.parametrize("store", ["device", "host", "file", "none"])
def test_features_are_read_on_the_gpu_from_any_store(store, gpu, network, few, tmp_path):
    from archrepair.networks.blocks import split

    cut = split(network, "layer3", few.data.transform(few.data.train.batch(torch.arange(2)).to("cuda")))
    features = cache_features(cut, few.data.train, few.data.transform, device="cuda", store=store, folder=tmp_path)
    some = features.select(torch.arange(100, 160)).batch(torch.tensor([3, 0]))
    expected = cut.prefix(few.data.transform(few.data.train.batch(torch.tensor([103, 100])).to("cuda")))
    assert isinstance(some, DeviceTensor) and torch.allclose(some.cpu(), expected.detach().cpu(), atol=1e-6)


# --- around a repair


def test_the_main_job_from_the_command_line(room, gpu, capsys):
    words = ("repair", "--tier", "smoke", "--dataset", DATASET, "--device", "cuda", "--strategy", "pc-darts", "--block", "layer4",
             "--search-epochs", 1, "--finetune-epochs", 1)
    assert command(*words) == 0, capsys.readouterr().err
    folder = room / "outputs" / "repair"
    assert json.loads((folder / "record.json").read_text(encoding="utf-8"))["versions"]["machine"] == "pretended GPU"
    assert "pretended GPU" in (folder / "report.html").read_text(encoding="utf-8")
    assert command("evaluate", "--tier", "smoke", "--dataset", DATASET, "--device", "cuda", "--repaired", folder) == 0


def test_an_original_is_trained_there(gpu, epochs, few):
    network = create_model("resnet18", 10, width=0.125, stem_stride=2)
    train_original(network, few.data.train, TIERS["lite"], epochs=1, device="cuda")
    assert is_on_gpu(network) and [sum(waits.values()) for waits in epochs] == [1]


def test_a_repair_is_saved_loaded_and_exported(gpu, network, few, tmp_path):
    result = ArchRepair(strategy="pc-darts", search_epochs=0, finetune_epochs=1, block="layer4").repair(network, few.data)
    result.save(tmp_path / "repair")
    result.export(tmp_path / "network.pt2", few.data.transform(few.data.train.batch(torch.arange(1))))
    again = load(tmp_path / "repair", network)
    assert is_on_gpu(again) and same_state(again.cpu(), copy.deepcopy(result.model).cpu())


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_a_killed_training_goes_on_on_any_device(devices, wide, few, tmp_path):
    "float32 on both, so what comes out is what one run gives."
    recipe, path = Recipe(epochs=2, lr=0.02, batch_size=80), tmp_path / "c.pt"

    def train(device: str, **options) -> nn.Module:
        network = copy.deepcopy(wide).to(device)
        fit(network, Rows([image_features(few.data.train, few.data.transform, device)]), recipe, **options)
        return network

    with PretendedGPU():
        def kill(epoch: int, step: int) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(devices[0], checkpoint=path, before_step=kill)
        resumed, whole = train(devices[1], checkpoint=path), train("cpu")
        assert device_of(resumed).type == devices[1]
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in on_cpu(resumed).items())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_same_there(name, gpu, digits):
    images = digits.images[:3]
    there, here = corrupt(images.to("cuda"), name, 3), corrupt(images, name, 3)
    assert isinstance(there, DeviceTensor) and torch.equal(there.cpu(), here)


def test_images_may_lie_on_the_gpu(gpu, network, few):
    data = few.data
    there = RepairData(data.failures.to("cuda"), data.train.to("cuda"), data.val.to("cuda"), data.transform,
                       data.val_failures.to("cuda"), data.failure_rate)
    assert finetune(network, there, where="layer4", epochs=1).history.epochs[-1]["epoch"] == 1


# --- memory


def test_a_repair_in_little_memory(gpu, network, few, monkeypatch, recwarn):
    sizes = fits_only(monkeypatch, 16)
    tuned = finetune(network, few.data, where="layer4", epochs=2, batch_size=64)
    assert max(size for size in sizes if size <= 16) == 16 and sizes[64] == 1 and len(tuned.history.epochs) == 3
    said = [str(warning.message) for warning in recwarn if "does not hold a batch" in str(warning.message)]
    assert said == ["the memory of cuda:0 does not hold a batch of 64 images; it is done in 4 portions from now on"]


def test_where_no_image_fits_it_is_one_line(gpu, network, few, monkeypatch):
    fits_only(monkeypatch, 0)
    with pytest.raises(ArchrepairError, match="the memory of cuda:0 does not hold what the network makes of [234] images at a time"):
        finetune(network, few.data, where="layer4", epochs=1, batch_size=64)


def test_a_prediction_in_little_memory(gpu, network, few, monkeypatch):
    train = few.data.train
    whole = predict(network, train, few.data.transform)
    forward = type(network).forward

    def limited(self, x):
        if len(x) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(type(network), "forward", limited)
    assert torch.allclose(predict(network, train, few.data.transform), whole, atol=1e-5)
