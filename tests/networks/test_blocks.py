"""The blocks of a network, by name; and cutting it there: exactly, or not at all."""
import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.regnet import BlockParams

from archrepair.core.errors import ArchrepairError
from archrepair.networks import blocks
from archrepair.networks.blocks import Whole, block_holding, block_names, freeze, get_block, replace_block, split
from archrepair.networks.models import MODELS, create_model, list_models, outline

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 32, 32, generator=DRAW)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def networks():
    return {name: create_model(name, 10, width=0.125 if name == "densenet121" else 0.0625, stem_stride=2) for name in MODELS}


# --- names


@pytest.mark.parametrize(("name", "expected"), [
    ("vgg16", [f"features.block{i}" for i in range(1, 6)]), ("efficientnet_b0", [f"features.{i}" for i in range(1, 8)]),
    *((f"resnet{d}", [f"layer{i}" for i in range(1, 5)]) for d in (18, 50, 101)),
])
def test_blocks_of_table_2(networks, name, expected):
    assert block_names(networks[name]) == expected


def test_densenet_has_a_block_for_every_two_convolutions(networks):
    model = networks["densenet121"]
    names = block_names(model)
    assert len(names) == 6 + 12 + 24 + 16
    assert names[0] == "features.denseblock1.denselayer1" and names[-1].endswith("denseblock4.denselayer16")
    assert all(sum(isinstance(m, nn.Conv2d) for m in model.get_submodule(n).modules()) == 2 for n in names)


def test_blocks_of_a_network_we_do_not_know():
    conv = lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    assert block_names(nn.Sequential(conv(), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(3, 2))) == ["0", "2"]
    with pytest.raises(ArchrepairError, match="found no blocks in Sequential"):
        block_names(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))


TABLE = {
    "alexnet": [f"features.{i}" for i in (0, 3, 6, 8, 10)],
    "vgg11_bn": [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)],
    "squeezenet1_1": [f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)],
    "densenet121": [f"features.denseblock{i}" for i in (1, 2, 3, 4)],
    "googlenet": [f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")],
    "inception_v3": [f"Mixed_{i}" for i in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")],
    "mobilenet_v3_small": [f"features.{i}" for i in range(1, 12)],
    "mnasnet0_5": [f"layers.{i}" for i in range(8, 14)],
    "shufflenet_v2_x0_5": ["stage2", "stage3", "stage4"],
    "regnet_y_400mf": [f"trunk_output.block{i}" for i in (1, 2, 3, 4)],
    "convnext_tiny": [f"features.{i}" for i in (1, 3, 5, 7)],
    "swin_t": [f"features.{i}" for i in (1, 3, 5, 7)],
    "vit_b_16": [f"encoder.layers.encoder_layer_{i}" for i in range(12)],
    "maxvit_t": [f"blocks.{i}" for i in range(4)],
    "resnext50_32x4d": ["layer1", "layer2", "layer3", "layer4"],
}


@pytest.fixture
def on_meta(monkeypatch):
    "RegNet computes its widths with tensors, which must be real ones."
    make = BlockParams.from_init_params.__func__

    def real(cls, *arguments, **more):
        with torch.device("cpu"):
            return make(cls, *arguments, **more)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(real))
    return outline


@pytest.mark.parametrize("name", TABLE)
def test_blocks_of_torchvisions_networks(on_meta, name):
    assert block_names(on_meta(f"torchvision:{name}")) == TABLE[name]


def test_every_network_of_torchvision_has_blocks(on_meta):
    "At least three, each run as a whole, none inside another, none with most of the layers; together they are most of the network."
    names = list_models("torchvision:*")
    assert len(names) >= 80
    for name in names:
        model = on_meta(name)
        blocks = block_names(model)
        parts = [model.get_submodule(b) for b in blocks]
        inside = [sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in part.modules()) for part in parts]
        everything = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
        assert 3 <= len(blocks) <= 60 and len(set(blocks)) == len(blocks), name
        assert not [b for a in blocks for b in blocks if b.startswith(f"{a}.")], name
        assert all(get_block(model, b, whole=True) is part for b, part in zip(blocks, parts)), name
        assert min(inside) >= 1 and max(inside) <= 0.8 * sum(inside) and sum(inside) >= 0.6 * everything, (name, inside, everything)
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("name", "first", "last", "count"), [
    ("mobilenetv3_small_050", "blocks.0", "blocks.4", 5), ("efficientnet_b0", "blocks.0", "blocks.6", 7),
    ("convnext_atto", "stages.0", "stages.3", 4), ("vit_tiny_patch16_224", "blocks.0", "blocks.11", 12),
    ("swin_tiny_patch4_window7_224", "layers.0", "layers.3", 4), ("regnety_002", "s1", "s4", 4),
    ("resnet10t", "layer1", "layer4", 4), ("legacy_seresnet18", "layer1", "layer4", 4), ("twins_svt_small", "blocks.0.0", "blocks.3.3", 18),
    ("eva02_tiny_patch14_224", "blocks.0", "blocks.11", 12), ("cait_xxs24_224", "blocks.0", "blocks_token_only.1", 26),
    ("vgg11", "features.0", "features.18", 8),
    ("hrnet_w18_small", "layer1", "stage4", 4), ("tresnet_m", "body.layer1", "body.layer4", 4), ("test_vit3", "blocks.0", "blocks.8", 9),
])
def test_blocks_of_timms_networks(name, first, last, count):
    names = block_names(outline(f"timm:{name}"))
    assert (names[0], names[-1], len(names)) == (first, last, count)


def boxes(*parts, **named) -> nn.Module:
    "A network drawn as boxes: a number is so many convolutions in a row, a module itself."
    convs = lambda n: nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(n))) if n > 1 else nn.Conv2d(4, 4, 3, padding=1)
    numbered = {str(i): convs(p) if isinstance(p, int) else p for i, p in enumerate(parts)}
    return nn.Sequential(OrderedDict(numbered | {name: convs(p) if isinstance(p, int) else p for name, p in named.items()}))


class Stage(nn.Module):
    "Two layers, and a forward pass of its own."

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.two(self.one(x))


@pytest.mark.parametrize(("network", "expected"), [
    (boxes(stem=3, stage1=4, stage2=4, fc=nn.Linear(4, 2)), ["stage1", "stage2"]),
    (boxes(first=3, second=4, classifier=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), ["first", "second"]),
    (boxes(first=3, second=4, last=nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))), ["first", "second"]),  # by what it is
    (boxes(backbone=boxes(1, 4, 1, 4, 1, 4), head=nn.Linear(4, 2)), ["backbone.1", "backbone.3", "backbone.5"]),
    (boxes(net=boxes(backbone=boxes(3, 3, 3), neck=2), head=2), ["net.backbone.0", "net.backbone.1", "net.backbone.2", "net.neck"]),
    (boxes(stem=1, stages=nn.ModuleList([boxes(2, 2), boxes(2, 2)]), head=nn.Linear(4, 2)), ["stages.0", "stages.1"]),
    (boxes(stages=nn.ModuleDict({"a": Stage(), "b": nn.ModuleList([Stage(), Stage()])}), out=nn.Linear(4, 2)),
     ["stages.a", "stages.b.0", "stages.b.1"]),
    (boxes(1, 1, 1, nn.Linear(4, 2)), ["0", "1", "2"]),
    (boxes(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ["1", "3"]),
    (boxes(stem=1, unit=Stage(), out=nn.Linear(4, 2)), ["unit"]),  # a residual unit stays whole
    (boxes(stem=1, aux_head=3, first=2, second=3, out=nn.Linear(4, 2)), ["first", "second"]),
    (boxes(embed=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), long=boxes(*[2] * 30), short=2, out=nn.Linear(4, 2)),
     [*(f"long.{i}" for i in range(30)), "short"]),
    (boxes(long=boxes(*[2] * 8), a=3, b=3, out=nn.Linear(4, 2)), ["long", "a", "b"]),  # large, but not nearly everything
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3), [f"layers.{i}" for i in range(3)]),
])
def test_boxes_in_boxes(network, expected):
    assert block_names(network) == expected


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "timm:vit_tiny_patch16_224"])
def test_attention_of_torch_has_no_layers_of_its_own(name):
    "torch's attention uses the weights of its projections without calling them, so nothing is seen there; others call them."
    model = outline(name)
    attention = next(m for n, m in model.named_modules() if n.endswith(("self_attention", "attn")))
    assert blocks._size(attention) == (0 if "torchvision" in name else 2)


@pytest.mark.parametrize("name", ["layer5", "", "layer1.9", "fc.x"])
def test_unknown_block(networks, name):
    for act in (get_block, split):
        with pytest.raises(ArchrepairError, match="unknown block .*layer1, layer2, layer3, layer4"):
            act(networks["resnet18"], name)


def test_any_part_can_be_named_and_the_closest_is_suggested(networks):
    assert get_block(networks["resnet18"], "layer2.0.conv1") is networks["resnet18"].layer2[0].conv1
    with pytest.raises(ArchrepairError, match=r"did you mean 'layer2.0.conv1'\? known: layer1, .*, and any other part by its name"):
        get_block(networks["resnet18"], "layer2.0.covn1")
    with pytest.raises(ArchrepairError, match=r"denselayer1, .*, … 34 more, and any other"):
        get_block(networks["densenet121"], "xx")
    with pytest.raises(ArchrepairError, match="unknown block 'x': known: 0, 1"):
        get_block(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "x")  # where no blocks are found there are parts all the same


def test_the_block_that_holds_a_layer():
    names = ["layer1", "layer10", "stages.0"]
    assert [block_holding(layer, names) for layer in ("layer10.0.conv1", "layer1", "stages.0.conv", "stages.01.conv", "conv1", "")] == [
        "layer10", "layer1", "stages.0", None, None, None]
    assert block_holding("conv1", []) is None


def test_a_list_of_modules_never_runs_as_a_whole():
    model = boxes(stages=nn.ModuleList([Stage(), Stage()]), out=nn.Linear(4, 2))
    assert get_block(model, "stages") is model.stages
    for act in (lambda: split(model, "stages"), lambda: get_block(model, "stages", whole=True)):
        message = "block stages is a ModuleList, which never runs as a whole; name one of its parts: stages.0, stages.1"
        with pytest.raises(ArchrepairError, match=message):
            act()


# --- cutting

COUNTS = {"vgg16": 5, "resnet18": 4, "resnet50": 4, "resnet101": 4, "efficientnet_b0": 7, "cifar-resnet20": 3}
CUTS = [(name, i) for name, n in COUNTS.items() for i in range(n)]
CUTS += [("densenet121", i) for i in (0, 5, 6, 30, 41, 42, 57)]  # first, and on both sides of the transitions


@pytest.mark.parametrize(("name", "position"), CUTS)
def test_the_cut_is_exact(networks, name, position):
    model = networks[name]
    block = block_names(model)[position]
    cut = split(model, block)
    other = randomize(copy.deepcopy(cut.block), position)
    with torch.inference_mode():
        features = cut.features(X)
        kept = features.clone()
        assert cut.prefix is not None and torch.equal(cut.tail()(features), model(X))
        changed = cut.tail(other)(features)
        assert torch.equal(changed, replace_block(model, block, other)(X)) and not torch.equal(changed, model(X))
        assert torch.equal(features, kept), "the tail writes into its input"


def test_no_part_of_the_work_is_done_twice(networks):
    "Prefix and suffix share no parameters, and with the block they are the whole network."
    model = networks["resnet18"]
    cut = split(model, "layer3")
    parts = [{id(p) for p in part.parameters()} for part in (cut.prefix, cut.block, cut.suffix)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    assert len(set.union(*parts)) == len(list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_splitting_leaves_the_model_alone(networks, untouched, quiet_stream, training):
    model = copy.deepcopy(networks["resnet18"]).train(training)
    with untouched(model):
        cut = split(model, "layer2")
        assert not cut.model.training and not any(p.requires_grad for p in cut.model.parameters())
        assert not {id(p) for p in cut.model.parameters()} & {id(p) for p in model.parameters()}
        randomize(cut.block, 3)


def test_replace_block_shares_the_new_block_and_copies_the_rest(networks, untouched):
    model = networks["resnet18"]
    new = nn.Identity()
    with untouched(model):
        other = replace_block(model, "layer2", new)
        assert other.layer2 is new and other.layer1 is not model.layer1
        assert torch.equal(other.fc.weight, model.fc.weight) and other.fc.weight.data_ptr() != model.fc.weight.data_ptr()
        assert not isinstance(model.layer2, nn.Identity)
    nested = replace_block(model, "layer2.1.conv1", new)
    assert nested.layer2[1].conv1 is new and not isinstance(nested.layer2[0].conv1, nn.Identity)


class Toy(nn.Module):
    "A small network; `how` says what is odd about the way it uses its block."

    def __init__(self, how: str = "plain"):
        super().__init__()
        self.how = how
        self.stem, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.register_buffer("scale", torch.tensor(1.5))
        randomize(self, 5)

    def forward(self, x):
        n = x.shape[0] if self.how == "own size" else None
        y = self.stem(x)
        match self.how:
            case "plain": z = self.block(y * self.scale) * self.scale
            case "dropout": z = nn.functional.dropout(self.block(nn.functional.dropout(y, training=self.training)), training=self.training)
            case "inplace block": z = self.block(torch.relu_(y))
            case "skip": z = self.block(y) + y
            case "twice": z = self.block(self.block(y))
            case "branch": z = self.block(y if y.mean() > 0 else -y)
            case "part": z = self.block[0](self.block(y))
            case "weight": z = self.block(y) * self.block[0].weight.mean()
            case "own size": return self.head(self.block(y).mean((2, 3)).view(n, -1))
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("how", ["plain", "dropout", "inplace block", "skip", "twice", "branch", "part", "weight", "own size"])
def test_odd_networks_are_cut_exactly_or_run_as_a_whole(how, untouched):
    model = Toy(how)
    with untouched(model):
        cut = split(model, "block")
        assert (cut.prefix is not None) == (how in ("plain", "dropout", "inplace block")), "cut" if cut.prefix else "not cut"
        other = randomize(copy.deepcopy(cut.block), 6)
        with torch.inference_mode():
            assert torch.equal(cut.tail()(cut.features(X)), model(X))
            assert torch.equal(cut.tail(other)(cut.features(X)), replace_block(model, "block", other)(X))


def test_a_whole_network_in_place_of_a_tail_still_trains_its_block_alone():
    tail = split(Toy("skip"), "block").tail()
    assert isinstance(tail, Whole) and tail.block is tail.model.block
    assert sum(1 for _ in tail.parameters()) == sum(1 for _ in Toy().parameters()), "the block must not be listed twice"
    twin = copy.deepcopy(tail)
    assert twin.block is twin.model.block and twin.block is not tail.block


def test_freeze():
    model = freeze(Toy().train())
    assert not model.training and not model.block.training and not any(p.requires_grad for p in model.parameters())


FOREIGN = [("torchvision:vit_b_32", 11), ("torchvision:shufflenet_v2_x0_5", 0), ("torchvision:googlenet", 4),
           ("torchvision:mobilenet_v3_small", 9), ("timm:mobilenetv3_small_050", 2), ("timm:vit_tiny_patch16_224", 3),
           ("timm:regnety_002", 3), ("timm:test_convnext", 1)]


@pytest.mark.parametrize(("name", "position"), FOREIGN)
def test_networks_that_are_not_ours_are_cut_as_exactly(name, position):
    "Only the modules around the block need to be recorded: what others do with shapes and conditions is their own affair."
    model = create_model(name, 5)
    if "vit" in name:
        randomize(model.get_submodule("heads" if "torchvision" in name else "head"), 3)  # torchvision's begins at zero
    block = block_names(model)[position]
    cut = split(model, block, X)
    other = randomize(copy.deepcopy(cut.block), 1)
    with torch.inference_mode():
        assert cut.prefix is not None and cut.suffix is not None
        assert torch.equal(cut.tail()(cut.features(X)), model(X))
        assert torch.equal(cut.tail(other)(cut.features(X)), replace_block(model, block, other)(X))
        assert not torch.equal(cut.tail(other)(cut.features(X)), model(X))
    parts = [{id(p) for p in part.parameters()} for part in (cut.prefix, cut.block, cut.suffix)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2]


class Odd(nn.Module):
    "A network around a block that sees more than one tensor an image, or less."

    def __init__(self, how: str):
        super().__init__()
        self.how, self.stem, self.out = how, nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.block = nn.Conv2d(4, 4, 3, 1, 1)
        self.other = nn.Sequential(self.block if how == "shared" else nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU())
        self.pair, self.store = Pair(), Stores()
        self.recall = Recalls(self.store.memory)
        if how == "tied":
            self.other[0].weight = self.block.weight
        randomize(self, 2)

    def forward(self, x, scale=None):
        torch._assert(x.shape[1] == 3, "RGB")
        y = self.stem(x) if scale is None else self.stem(x) * scale
        match self.how:
            case "optional": z = self.block(y)
            case "checked":
                z = self.block(y)
                torch._assert(y.shape[0] == z.shape[0], "rows")
            case "shared" | "tied": z = self.other(self.block(y))
            case "folded": z = self.block(y.view(-1, 4, 8, 16)).view(-1, 4, 16, 16)
            case "tuple": z = self.pair((y, y))
            case "remembered": z = self.recall(self.block(self.store(y)))
        return self.out(z.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, pair):
        return pair[0] + pair[1]


class Stores(nn.Module):
    "Remembers what it was given, where another module finds it."

    def __init__(self):
        super().__init__()
        self.memory = {}

    def forward(self, x):
        self.memory["x"] = x
        return x


class Recalls(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, x):
        return x + self.memory["x"]


@pytest.mark.parametrize(("how", "is_cut"), [("optional", True), ("checked", True), ("shared", False), ("tied", False), ("folded", False),
                                             ("tuple", False), ("remembered", False)])
def test_a_cut_that_is_tried_is_exact_or_given_up(how, is_cut, untouched):
    model = Odd(how)
    block = "pair" if how == "tuple" else "block"
    with untouched(model):
        cut = split(model, block, X)
        assert (cut.prefix is not None, cut.suffix is not None) == (is_cut, is_cut)
        with torch.inference_mode():
            features = cut.features(X)
            assert len(features) == len(X) and torch.equal(cut.tail()(features), model(X))


def test_a_block_that_is_never_called():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 8, batch_first=True), 2)
    with pytest.raises(ArchrepairError, match="block layers.0.self_attn.out_proj .* is never called"):
        split(model, "layers.0.self_attn.out_proj", torch.zeros(2, 7, 12))
    assert split(model, "layers.0", torch.zeros(2, 7, 12)).block is not None
