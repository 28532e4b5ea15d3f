"""A conditional network is the original wherever its gates do not fire, whatever the network, and can be copied, stored and exported."""
import copy
import io
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.deploy.export import export_network
from archrepair.nas.gate import Gate
from archrepair.nas.operations import FILTERS
from archrepair.networks.blocks import first_of, get_block, replace_block
from archrepair.networks.conditional import FORMS, REST, Beside, Conditional, expert_place, make_expert, original_of, read_stages
from archrepair.networks.models import create_model
from support.states import assert_same_state, state_of

IMAGES = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Passed(nn.Module):
    "What enters the block passes it by: the network has no clean cut."

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.block1, self.block2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.block2(self.block1(x)) + x).mean((2, 3)))


def timm_network(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"vit": lambda: timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=10),
             "mixer": lambda: timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=3, num_classes=10)}
    network = sizes[name]()
    nn.init.normal_(network.head.weight)  # some heads begin at zero
    return network


NETWORKS = {
    "resnet18": (lambda: create_model("resnet18", 10, image_size=32, width=0.125, stem_stride=2, seed=0), "layer2"),
    "densenet": (lambda: create_model("densenet121", 10, image_size=32, width=0.125, stem_stride=2, seed=0), None),
    "vit": (lambda: timm_network("vit"), "blocks.1"),
    "mixer": (lambda: timm_network("mixer"), "blocks.1"),
    "no clean cut": (Passed, "block1"),
}


@torch.no_grad()
def conditional(network: nn.Module, *blocks: str | None, form: str | list[str] = "copy", x: torch.Tensor = IMAGES,
                sure: bool = True) -> Conditional:
    """A network with a changed expert in each block, called for by gates that fire on about half of `x`, well away from their thresholds.

    `form` is that of all experts or of each. Gates that are `sure` trust the expert wholly wherever they fire.
    """
    result = Conditional(network.eval())
    stages = read_stages(network)
    result.tap(stages)
    readings = result.read(x)[1]
    forms = [form] * len(blocks) if isinstance(form, str) else form
    for i, (name, form) in enumerate(zip(blocks, forms)):
        block = name or stages[len(stages) // 2]
        gate = Gate.for_example(x, {stage: readings[stage] for stage in stages})
        features = gate.features(x, readings)
        gate.mean.copy_(features.mean(0))
        gate.scale.copy_(features.std(0).clamp_min(1e-6))
        gate.weight.copy_(torch.randn(len(gate.weight), generator=torch.Generator().manual_seed(i)))
        gate.bias.fill_(1000.0 * sure)
        scores = gate.score(features).sort().values
        widest = int((scores[8:25] - scores[7:24]).argmax()) + 7
        gate.threshold.copy_((scores[widest] + scores[widest + 1]) / 2)
        result.tap([first_of(block)])
        expert = make_expert(form, get_block(result.original, block), result.read(x)[1][f"{first_of(block)}:input"])
        own = {id(p) for p in result.original.parameters()}
        for parameter in expert.parameters():
            if id(parameter) not in own:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
        result.add(f"repair{i}", block, expert, gate, form)
    return result.eval()


@pytest.fixture(scope="module")
def resnet():
    return NETWORKS["resnet18"][0]().eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_where_no_gate_fires_the_answers_are_the_originals_bit_for_bit(name):
    make, block = NETWORKS[name]
    network = make().eval()
    before = state_of(network)
    result = conditional(network, block)
    answers, expected = result(IMAGES), network(IMAGES)
    fired = result.fired >= 0
    assert 4 < int(fired.sum()) < 28
    assert torch.equal(answers[~fired], expected[~fired])
    assert (answers[fired] != expected[fired]).any(1).all()
    assert_same_state(before, network)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_images_that_fire_get_the_answer_of_the_network_with_the_expert_in_the_blocks_place(name):
    make, block = NETWORKS[name]
    network = make().eval()
    result = conditional(network, block)
    answers, fired = result(IMAGES), result.fired >= 0
    branch = result.branches["repair0"]
    assert torch.allclose(answers[fired], replace_block(network, branch.block, branch.expert)(IMAGES)[fired], atol=1e-4)
    assert (result._detours["repair0"].branch is None) == (name == "no clean cut")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_gate_that_is_not_sure_moves_the_logits_by_its_trust_and_spares_what_does_not_fire(name):
    make, block = NETWORKS[name]
    network = make().eval()
    result = conditional(network, block, sure=False)
    gate = result.repairs()[0].gate
    gate.weight.mul_(0.1)  # odds of about −2 to 2
    gate.threshold.mul_(0.1)
    answers, original, fired = result(IMAGES), network(IMAGES), result.fired >= 0
    trust = gate.trust(gate.features(IMAGES, result.read(IMAGES)[1]))[fired]
    assert 0.02 < trust.min() and trust.max() < 0.999 and trust.std() > 0.02
    gate.bias.add_(1000)
    gate.threshold.add_(1000)
    expert = result(IMAGES)
    assert torch.equal(result.fired >= 0, fired)
    expected = expert[fired] * trust[:, None] + original[fired] * (1 - trust[:, None])
    assert torch.allclose(answers[fired], expected, atol=1e-4)
    assert torch.equal(answers[~fired], original[~fired])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_of_expert_begins_as_the_block_and_adds_what_it_says(resnet, form):
    x = torch.rand(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(make_expert(form, resnet.layer2, x)(x), resnet.layer2(x), atol=1e-6)
    result = conditional(resnet, "layer2", form=form)
    answers, fired = result(IMAGES), result.fired >= 0
    assert torch.equal(answers[~fired], resnet(IMAGES)[~fired]) and (answers[fired] != resnet(IMAGES)[fired]).any()
    added = sum(p.numel() for p in result.parameters()) - sum(p.numel() for p in resnet.parameters())
    assert result.describe()[0]["parameters"] == added + len(result.branches["repair0"].gate.weight) + 1
    whole = sum(p.numel() for p in resnet.layer2.parameters())
    filters = sum(p.numel() for name, p in result.named_parameters() if ".filter." in name)
    assert added == whole + filters if form in ("copy", *FILTERS) else 0 < added < whole
    assert (filters > 0) == (form in FILTERS)


@pytest.mark.parametrize("form", ["copy", "norm"])
@pytest.mark.parametrize("block, inside", [
    ("layer1..layer3", ("layer1.", "layer2.", "layer3.")), ("layer3..", ("layer3.", "layer4.", "fc."))])
@torch.no_grad()
def test_an_expert_for_several_blocks_has_parts_for_each(resnet, block, inside, form):
    result = conditional(resnet, block, form=form)
    answers, expected, fired = result(IMAGES), resnet(IMAGES), result.fired >= 0
    assert torch.equal(answers[~fired], expected[~fired]) and (answers[fired] != expected[fired]).any(1).all()
    static = replace_block(resnet, block, result.repairs()[0].expert)
    assert torch.allclose(answers[fired], static(IMAGES)[fired], atol=1e-4)
    own = {id(p) for p in resnet.parameters()} | {id(p) for p in result.original.parameters()}
    changed = {name for name, p in static.named_parameters() if id(p) not in own and not torch.equal(p, resnet.get_parameter(name))}
    norms = {name for name in changed if "bn" in name or "downsample.1" in name}
    assert all(any(name.startswith(part) for name in changed) for part in inside if form == "copy" or part != "fc.")
    assert all(name.startswith(inside) for name in changed) and (form == "copy" or changed == norms)
    again = Conditional.build(resnet, result.describe()).eval()
    again.load_state_dict(result.state_dict())
    assert torch.equal(again(IMAGES), answers)
    assert result.train()(IMAGES).shape == answers.shape


def test_what_older_files_call_the_rest_is_a_span(resnet):
    entry = conditional(resnet, "layer3..").describe()[0]
    old = Conditional.build(resnet, [entry | {"block": "layer3", "form": REST}])
    assert old.describe() == [entry | {"threshold": 0.0}]
    assert {name.split(".")[0] for name, _ in old.branches["repair0"].expert.named_parameters()} == {"block", "suffix"}


@pytest.mark.parametrize("block, form, message", [
    ("layer1..layer2", "affine", "copy or norm"), ("layer3..layer1", "copy", "cannot be cut out"), ("layer1..layer9", "copy", "'layer9'")])
def test_spans_that_cannot_be_are_one_line(resnet, block, form, message):
    with pytest.raises(ArchrepairError, match=message):
        get_block(resnet, expert_place(block, form)[0])


def test_an_expert_of_normalization_layers_shares_the_rest_also_after_it_was_copied(resnet):
    result = conditional(resnet, "layer2", form="norm")
    trained = copy.deepcopy(result.branches["repair0"].expert)  # as training copies it
    again = Conditional(resnet)
    again.add("norm", "layer2", trained, Gate([], 0), "norm")
    own, theirs = (dict(m.named_parameters()) for m in (again.original.layer2, again.branches["norm"].expert))
    assert {name for name in own if own[name] is not theirs[name]} == {name for name in own if "bn" in name or "downsample.1" in name}


@torch.no_grad()
def test_where_two_gates_fire_the_one_whose_failures_are_nearest_decides(resnet):
    result = conditional(resnet, "layer1", "layer3")
    gates = [branch.gate for branch in result.branches.values()]
    readings = result.read(IMAGES)[1]
    features = [gate.features(IMAGES, readings) for gate in gates]
    for gate, its, row in zip(gates, features, (3, 20)):
        gate.center.copy_(its[row])
        gate.spread.copy_(its.std(0) + 0.01)
    result(IMAGES)
    expected = []
    for i in range(len(IMAGES)):
        firing = [k for k, gate in enumerate(gates) if gate.score(features[k][i:i + 1]) > gate.threshold]
        expected.append(min(firing, key=lambda k: float(gates[k].distance(features[k][i:i + 1])), default=-1))
    assert result.fired.tolist() == expected and set(expected) == {-1, 0, 1}


@torch.no_grad()
def test_each_repair_can_be_taken_out(resnet):
    both = conditional(resnet, "layer1", "layer3")
    first = both.without("repair1")
    assert list(first.branches) == ["repair0"] and list(both.branches) == ["repair0", "repair1"]
    assert torch.equal(first(IMAGES), conditional(resnet, "layer1")(IMAGES))
    bare = first.without("repair0")
    assert type(bare) is type(resnet) and torch.equal(bare(IMAGES), resnet(IMAGES))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert original_of(resnet) is resnet
    with pytest.raises(ArchrepairError, match="repair9"):
        both.without("repair9")


@pytest.mark.parametrize("name", ["repair0", "", "a.b", "keys"])
def test_names_that_cannot_be_used_are_one_line(resnet, name):
    result = conditional(resnet, "layer1")
    with pytest.raises(ArchrepairError, match="cannot be the name of a repair"):
        result.add(name, "layer2", copy.deepcopy(resnet.layer2), Gate([], 0))


@pytest.mark.parametrize("form", ["copy", "norm", "affine"])
@torch.no_grad()
def test_copies_pickles_and_state_dicts_give_the_same_answers(resnet, form):
    result = conditional(resnet, "layer1", "layer3", form=form)
    expected = result(IMAGES)
    assert torch.equal(copy.deepcopy(result)(IMAGES), expected)
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IMAGES), expected)
    built = Conditional.build(create_model("resnet18", 10, image_size=32, width=0.125, stem_stride=2, seed=7).eval(), result.describe())
    built.load_state_dict(result.state_dict())
    assert torch.equal(built(IMAGES), expected)
    moved = copy.deepcopy(result)
    assert moved._detours == {} and not {id(p) for p in moved.parameters()} & {id(p) for p in result.parameters()}


def test_a_description_that_is_none_is_one_line(resnet):
    with pytest.raises(ArchrepairError, match="not a conditional repair"):
        Conditional.build(resnet, [{"name": "x", "block": "layer1"}])


@pytest.mark.parametrize("form, block", [("norm", nn.Linear(3, 3)), ("sep_conv", nn.Linear(3, 3)), ("nothing", nn.Linear(3, 3))])
def test_forms_that_do_not_fit_are_one_line(form, block):
    with pytest.raises(ArchrepairError):
        make_expert(form, block, torch.rand(2, 3))


def test_an_expert_for_vectors_has_a_factor_per_number():
    block = nn.Linear(3, 5)
    expert = make_expert("affine", block, torch.rand(2, 3))
    assert isinstance(expert, Beside) and sum(p.numel() for p in expert.parameters()) == 10
    assert expert(torch.rand(2, 3)).shape == (2, 5)


@torch.no_grad()
def test_threads_do_not_disturb_each_other(resnet):
    result = conditional(resnet, "layer1", "layer3")
    batches = [IMAGES[i::4].clone() for i in range(4)]
    expected = [result(batch) for batch in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(result(batches[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("name, blocks, forms", [
    ("resnet18", ["layer1", "layer2..layer3"], ["shrink", "norm"]), ("no clean cut", ["block1"], ["instance"])])
@torch.no_grad()
def test_files_give_the_same_answers_for_256_images(name, blocks, forms, suffix, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = NETWORKS[name][0]()
    many = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = conditional(network, *blocks, x=many, sure=False, form=forms)
    expected = result(many)
    assert {-1, *range(len(blocks))} == set(result.fired.tolist())
    path = export_network(result, tmp_path / f"network{suffix}", many[:4])
    code = ("import sys, torch\nmany = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))\n" + {
        ".onnx": "import onnxruntime as o\ns = o.InferenceSession(sys.argv[1])\n"
                 "run = lambda x: torch.from_numpy(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0])\n",
        ".pt2": "run = torch.export.load(sys.argv[1]).module()\n"}[suffix]
        + "torch.save(torch.cat([run(many[:1]), run(many[1:200]), run(many[200:])]), sys.argv[2])")
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "answers.pt")], check=True, capture_output=True)
    answers = torch.load(tmp_path / "answers.pt")
    readings, near = result.read(many)[1], []
    for branch in result.branches.values():
        near.append((branch.gate.score(branch.gate.features(many, readings)) - branch.gate.threshold).abs())
    clear = torch.stack(near).amin(0) > 1e-3  # a rounding error may decide about the others
    assert int(clear.sum()) > 240
    assert torch.allclose(answers[clear], expected[clear], atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet18", "layer3.."), ("no clean cut", "block1")])
@torch.no_grad()
def test_a_file_holds_a_choice_whether_or_not_the_network_has_run_before(name, block):
    result = conditional(NETWORKS[name][0](), block)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(result, (IMAGES[:4],), dynamic_shapes=batch)
    assert [node.target for node in program.graph.nodes].count(torch.ops.higher_order.cond) == 1
    assert not result._detours  # nothing that was traced is kept
    assert torch.allclose(program.module()(IMAGES), result(IMAGES), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "no clean cut"])
@torch.no_grad()
def test_a_network_that_has_run_can_be_converted_trained_and_repaired_again_under_the_same_name(name):
    result = conditional(NETWORKS[name][0](), NETWORKS[name][1])
    first = result(IMAGES)
    assert torch.allclose(result.double()(IMAGES.double()).float(), first, atol=1e-3)
    result.float()
    branch = result.branches["repair0"]
    del result.branches["repair0"]
    result.add("repair0", branch.block, copy.deepcopy(result.original.get_submodule(branch.block)), branch.gate)
    again = result(IMAGES)
    assert (result.fired >= 0).any() and torch.allclose(again, result.original(IMAGES), atol=1e-4)
    assert result.train()(IMAGES).shape == first.shape and result.branches["repair0"].expert.training
