"""Networks as people have them come in by one door: repaired as the plain network inside would be, or refused in one line."""
import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from archrepair.baselines.retrain import Retrain
from archrepair.core.copies import duplicate
from archrepair.core.errors import ArchrepairError, Notice, note_once
from archrepair.deploy.export import export_network
from archrepair.networks.admission import admit, admit_to_repair, device_of, rehearse, unwrap
from archrepair.networks.blocks import block_names, split, thaw
from archrepair.networks.weights import save_weights, tensors_of
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.blockdata import prepare
from archrepair.repair.finetuning import finetune
from archrepair.repair.localization import localize
from archrepair.repair.result import RepairResult, load
from archrepair.repair.search import search
from archrepair.training.evaluation import predict
from archrepair.training.fit import Recipe, fit
from archrepair.training.rows import Rows, image_features
from support.forms import OTHER, REFUSED, SAME, Plain, compiled, data, shrunk, watched, with_part
from support.states import same_state

METHODS = {"archrepair": ArchRepair(strategy="pc-darts", search_epochs=1, finetune_epochs=1, precision="fp32"),
           "retrain": Retrain(epochs=1, precision="fp32")}
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def answer(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(IMAGES)


def own(result: RepairResult) -> RepairResult:
    "The result with the method's network as the one that is kept, whether it won or not."
    return replace(result, model=result.candidates["repaired"], verdict=replace(result.verdict, chosen="repaired"))


@pytest.fixture(scope="module")
def plain() -> dict[str, RepairResult]:
    "The repairs of the plain network."
    return {name: method.repair(Plain(), data()) for name, method in METHODS.items()}


def brought(kind: str) -> tuple[nn.Module, dict]:
    "A network of that kind in a mixed mode, and what must not change in it."
    network = {**SAME, **OTHER}[kind]()
    network.train()
    unwrap(network).block1.eval()
    return network, state(network)


def state(network: nn.Module) -> dict:
    return {"tensors": {name: value.clone() for name, value in tensors_of(network).items()},
            "modes": [module.training for module in network.modules()],
            "flags": [(name, p.requires_grad, p.grad) for name, p in network.named_parameters()],
            "hooks": [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in network.modules()]}


def check_untouched(network: nn.Module, before: dict) -> None:
    after = state(network)
    assert all(torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items())
    assert [before[key] for key in ("modes", "flags", "hooks")] == [after[key] for key in ("modes", "flags", "hooks")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", SAME)
def test_a_network_is_repaired_as_the_plain_one_inside(kind, name, plain, tmp_path):
    network, before = brought(kind)
    result = METHODS[name].repair(network, data())
    check_untouched(network, before)
    for candidate, expected in plain[name].candidates.items():
        weights, expected = tensors_of(result.candidates[candidate]), tensors_of(expected)
        assert weights.keys() - {"steps"} == expected.keys()  # no prefix
        assert all(torch.equal(weights[key], value) for key, value in expected.items()), candidate
    own(result).save(tmp_path)
    for model in (network, unwrap(network)):
        assert torch.equal(answer(load(tmp_path, model)), answer(plain[name].candidates["repaired"]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", OTHER)
def test_computed_and_unusual_layers_are_repaired_and_load_again(kind, name, tmp_path):
    network, before = brought(kind)
    result = own(METHODS[name].repair(network, data()))
    check_untouched(network, before)
    repaired = result.model
    assert torch.equal(answer(load(result.save(tmp_path), network)), answer(repaired))
    for module in repaired.modules():  # pruned weights stay zero
        for mask, kept in list(module.named_buffers(recurse=False)):
            if mask.endswith("_mask"):
                assert 0 < float((kept == 0).float().mean()) < 1 and not getattr(module, mask.removesuffix("_mask"))[kept == 0].any()


def copy_in_eval(network: nn.Module) -> nn.Module:
    copied = duplicate(network)
    copied.eval()
    return copied


@pytest.mark.parametrize("kind", OTHER)
def test_what_a_computed_weight_is_made_of_learns_and_is_copied(kind):
    network = thaw(duplicate(OTHER[kind]()))
    before, problem = answer(copy_in_eval(network)), data()
    fit(network, Rows([image_features(problem.train, problem.transform)]), Recipe(epochs=1, lr=0.1), select="last")
    assert not torch.allclose(answer(network), before)
    with torch.enable_grad():
        network(IMAGES)  # whatever is computed now has a history
    assert torch.equal(answer(duplicate(network)), answer(network))


def test_norms_and_ties_hold_after_a_repair():
    normed = Retrain(epochs=1).repair(OTHER["spectral_norm"](), data()).candidates["repaired"]
    for module in normed.modules():
        if isinstance(module, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(module.weight.flatten(1), 2)) < 1.2  # an estimate of a few steps
    for method in (Retrain(epochs=1), ArchRepair(strategy="pc-darts", search_epochs=0, finetune_epochs=1, block="block1")):
        tied = method.repair(OTHER["tied"](), data()).candidates["repaired"]
        assert tied.block2[0].weight is tied.block1[3].weight


# --- what is refused


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_repaired_is_one_line(kind, name):
    make, pattern = REFUSED[kind]
    network, worked = make(), []
    transform = lambda x: worked.append(len(x)) or data().transform(x)
    with pytest.raises(ArchrepairError, match=pattern) as caught:
        METHODS[name].repair(network, replace(data(), transform=transform))
    assert "\n" not in str(caught.value) and sum(worked) <= 6  # of the rehearsal, of counting channels, and of trying a transform


@pytest.mark.parametrize("kind", ["lazy", "meta", "double", "a class", "a state dict"])
@pytest.mark.parametrize("act", [
    lambda network: predict(network, data().failures, data().transform), lambda network: localize(network, data()),
    lambda network: prepare(network, "block2", data()), lambda network: finetune(network, data(), where="block2"),
    lambda network: search(network, "block2", data()),
    lambda network: export_network(network, Path(tempfile.gettempdir(), "n.pt2"), IMAGES),
    lambda network: load(tempfile.gettempdir(), network),
], ids=["predict", "localize", "prepare", "finetune", "search", "export", "load"])
def test_every_entry_has_the_same_door(kind, act):
    make, pattern = REFUSED[kind]
    with pytest.raises(ArchrepairError, match=pattern):
        act(make())


def test_the_name_in_a_wrapper_leads_to_the_name_inside():
    with pytest.raises(ArchrepairError, match="unknown block '_orig_mod.block2': did you mean 'block2'?"):
        ArchRepair(strategy="pc-darts", block="_orig_mod.block2").repair(compiled(Plain()), data())


def test_integer_weights_can_still_answer():
    for kind in ("quantized", "dynamically quantized", "scripted"):
        network = REFUSED[kind][0]()
        assert predict(network, data().failures, data().transform).shape == (32, 4)
    assert device_of(nn.Identity()) == torch.device("cpu")


# --- the plain network inside


def test_what_is_plain_is_returned_itself():
    network = Plain()
    assert unwrap(network) is admit(network) is admit_to_repair(network) is rehearse(network, IMAGES) is network
    assert unwrap(nn.DataParallel(compiled(network))) is network
    parts = with_part(nn.DataParallel)
    assert isinstance(parts.block1, nn.DataParallel)
    inside = unwrap(parts)
    assert same_state(inside, network) and inside.block2[0].weight is not parts.block2[0].weight


@pytest.mark.parametrize("kind", SAME)
def test_no_file_and_no_name_has_a_prefix(kind, tmp_path):
    network = SAME[kind]()
    assert block_names(network) == ["block1", "block2"]
    save_weights(network, tmp_path / "weights.safetensors")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "weights.safetensors").keys() - {"steps"} == Plain().state_dict().keys()
    with torch.no_grad():
        cut = split(network, "block2", IMAGES)
        assert cut.prefix is not None
        assert torch.allclose(cut.tail()(cut.features(IMAGES)), Plain().eval()(IMAGES), atol=1e-6)


@pytest.mark.parametrize("kind", ["compiled", "a part in parallel", "lock", "extra state", "weight_norm", "old weight_norm", "pruned"])
def test_exports_hold_the_network_inside(kind, tmp_path):
    network = {**SAME, **OTHER}[kind]()
    file = torch.export.load(export_network(network, tmp_path / "network.pt2", IMAGES))
    assert not [name for name in file.state_dict if "module." in name or "_orig_mod" in name]
    assert torch.allclose(file.module()(IMAGES), answer(copy_in_eval(network)), atol=1e-5)


def test_a_process_group_is_taken_off(tmp_path):
    import torch.distributed as distributed

    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(Plain())
        assert unwrap(network) is network.module
        assert Retrain(epochs=1).repair(network, data()).model.state_dict().keys() == Plain().state_dict().keys()
    finally:
        distributed.destroy_process_group()


# --- hooks


def test_hooks_that_look_on_do_not_see_the_repair():
    note_once.cache_clear()
    network = watched()
    with pytest.warns(Notice, match="2 hooks of the network only look on; they are left out"):
        result = Retrain(epochs=1).repair(network, data())
    assert [len(seen) if isinstance(seen, torch.Tensor) else len(seen[0]) for seen in network.seen] == [2, 2]  # the rehearsal's
    assert not result.model._forward_pre_hooks and network._forward_pre_hooks


def test_hooks_that_change_the_answer_stay():
    note_once.cache_clear()
    network = shrunk()
    with pytest.warns(Notice, match="1 hooks change what the network answers; they run in the repair"):
        result = Retrain(epochs=0).repair(network, data())
    assert torch.equal(answer(result.model), answer(copy_in_eval(network)))


# --- torch's own modes around the call


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "float64": double_by_default,
          "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "meta device": lambda: torch.device("meta"),
          "deterministic": deterministic}


def modes() -> tuple:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device(),
            torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("around", AROUND)
def test_the_modes_around_a_repair_make_no_difference_and_are_kept(around, name, plain):
    network, repair_set = Plain(), data()
    with AROUND[around]():
        before = modes()
        result = METHODS[name].repair(network, repair_set)
        votes = localize(network, repair_set).to_dict()
        logits = predict(network, repair_set.failures, repair_set.transform)
        assert modes() == before
    assert all(same_state(result.candidates[key], value) for key, value in plain[name].candidates.items())
    assert votes == localize(network, repair_set).to_dict()
    assert torch.equal(logits, predict(network, repair_set.failures, repair_set.transform))
