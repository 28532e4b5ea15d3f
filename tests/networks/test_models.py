"""The six networks: torchvision's own, at any size and width, from the caller's seed; and any other by its name."""
import copy
import re
import sys
import time

import pytest
import torch
from torch import nn
from torchvision.models import densenet, get_model, resnet, vgg

from archrepair.core.errors import ArchrepairError
from archrepair.core.layout import layout_of
from archrepair.networks.external import brings_weights, build
from archrepair.networks.models import MODELS, create_model, list_models, outline


def test_the_papers_six():
    six = ["vgg16", "resnet18", "resnet50", "resnet101", "densenet121", "efficientnet_b0"]
    assert list_models() == [*six, *(f"cifar-resnet{depth}" for depth in (20, 32, 44, 56, 110))]
    assert list_models("resnet*") == ["resnet18", "resnet50", "resnet101"] and list_models("alex*") == []


@pytest.mark.parametrize("name", MODELS)
def test_shapes_modes_and_finite_weights(name):
    for size, stride, width in ((32, 1, 0.0625), (64, 2, 0.125)):
        model = create_model(name, 7, image_size=size, stem_stride=stride, width=width)
        with torch.inference_mode():
            logits = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        assert logits.shape == (2, 7) and logits.isfinite().all() and not model.training
        assert all(v.isfinite().all() for v in model.state_dict().values()) and all(p.requires_grad for p in model.parameters())
        kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert all(k.is_contiguous(memory_format=layout_of(model)) for k in kernels)


def test_at_224_px_the_stem_is_torchvisions():
    model = create_model("resnet18", 5, image_size=224, width=0.0625)
    assert model.conv1.kernel_size == (7, 7) and model.conv1.stride == (2, 2) and isinstance(model.maxpool, nn.MaxPool2d)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_173_962), ("densenet121", 6_956_426),
                                             ("efficientnet_b0", 4_020_358), ("vgg16", 14_728_266)])
def test_full_width_has_the_well_known_number_of_parameters(name, count):
    "ResNets and VGG-16 as in the CIFAR ports; the others with torchvision's own number, less classes and stem."
    model = create_model(name, 10)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_weights_and_the_global_stream_is_left_alone(name):
    before = torch.random.get_rng_state()
    a, b, c = (create_model(name, 10, width=0.0625, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(not torch.equal(a[k], c[k]) for k in a if a[k].ndim > 1)


def test_fresh_statistics_and_initialization():
    model = create_model("resnet18", 10, width=0.25)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.running_mean == 0).all() and (m.running_var == 1).all() and m.num_batches_tracked == 0
            assert (m.weight == 1).all() and (m.bias == 0).all()
    w = model.layer4[0].conv2.weight.detach()
    assert float(w.std()) == pytest.approx((2 / (w.shape[0] * 9)) ** 0.5, rel=0.05)
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.2)


def test_width_scales_all_but_image_and_classes():
    model = create_model("resnet18", 10, width=0.25)
    assert model.conv1.weight.shape == (16, 3, 3, 3) and model.fc.weight.shape == (10, 128)
    wide = create_model("efficientnet_b0", 10, width=0.25)
    depthwise = [m for m in wide.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 16 and all(m.groups == m.in_channels == m.out_channels for m in depthwise)


def run_both(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs.to(memory_format=layout_of(theirs)).eval()(x))


def scramble(model: nn.Module) -> nn.Module:
    "BatchNorms that do something."
    draw = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
    return model


def test_dense_units_are_torchvisions_densenet():
    ours = scramble(create_model("densenet121", 10, width=0.125))
    theirs = densenet.DenseNet(4, (6, 12, 24, 16), 8, num_classes=10)
    theirs.features.conv0, theirs.features.pool0 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    run_both(ours, theirs)


def test_resnets_are_torchvisions():
    ours = scramble(create_model("resnet50", 10, width=0.125))
    theirs = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=64)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    full = scramble(create_model("resnet50", 10))
    theirs.load_state_dict(full.state_dict())
    run_both(full, theirs)
    assert {k: v.shape[0] for k, v in ours.state_dict().items() if v.ndim == 4} == {
        k: v.shape[0] // 8 for k, v in theirs.state_dict().items() if v.ndim == 4}


def test_vgg_blocks_are_torchvisions_features_in_order():
    ours = scramble(create_model("vgg16", 10, width=0.125))
    theirs = vgg.make_layers([c if c == "M" else c // 8 for c in vgg.cfgs["D"]], batch_norm=True)
    assert [len(b) for b in ours.features] == [7, 7, 10, 10, 10] and all(isinstance(b[-1], nn.MaxPool2d) for b in ours.features)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.features.state_dict().values(), strict=True)))
    run_both(ours.features, theirs)


@pytest.mark.parametrize("change", [{"width": 0}, {"width": 5}, {"width": -1}, {"stem_stride": 3}, {"n_classes": 1}])
def test_sizes_out_of_range(change):
    with pytest.raises(ArchrepairError, match="expected a width"):
        create_model(**{"name": "resnet18", "n_classes": 10} | change)


@pytest.mark.parametrize("case", [("densenet121", 0.3, 32), ("densenet121", 1 / 64, 32), ("vgg16", 0.125, 16), ("resnet18", 0.125, -3)])
def test_networks_that_could_not_run_are_not_built(case):
    name, width, size = case
    with pytest.raises(ArchrepairError, match="cannot be built") as caught:
        create_model(name, 10, width=width, image_size=size)
    assert "\n" not in str(caught.value)


def test_odd_widths_that_can_run_are_built():
    with torch.inference_mode():
        assert create_model("resnet18", 10, width=0.3)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        assert create_model("resnet18", 10, width=0.125, image_size=8)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_unknown_model():
    with pytest.raises(ArchrepairError, match="did you mean 'resnet18'"):
        create_model("resnet_18", 10)


# --- networks of others

FACTORIES = """
import random
import torch
from torch import nn

class Net(nn.Module):
    "Takes images of 8 px and more."
    def __init__(self, num_classes=3, scale=1.0):
        super().__init__()
        self.scale, self.conv, self.out = scale, nn.Conv2d(3, 4, 3, 2), nn.Linear(4, num_classes)
        self.requires_grad_(True)
    def forward(self, x):
        return self.out(self.conv(x * self.scale).mean((2, 3)))

class Maker:
    @staticmethod
    def deep(n_classes): return Net(n_classes)

def other(n_classes, width=4): return Net(n_classes)
def nothing(): return Net(5)
def options(**more): return Net(**more)
def needs(width, num_classes): return Net(num_classes)
def fails(num_classes): raise ValueError("no\\nway")
def answers(num_classes): return {"model": Net(num_classes)}
def volumes(num_classes):
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
def many(num_classes): return nn.Sequential(Net(num_classes), nn.Identity(), Twice())
def training(num_classes): return Net(num_classes).train()
def constant(num_classes):
    torch.manual_seed(3)
    return Net(num_classes)

class Twice(nn.Module):
    def forward(self, x): return {"out": x}

ready = constant(7)
ready.conv.requires_grad_(False)
number = 5
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    "A module `factories_of_test` in the current directory."
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    (tmp_path / "broken_of_test.py").write_text("import nothing_like_this_is_installed")
    monkeypatch.chdir(tmp_path)
    for name in ("factories_of_test", "broken_of_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = list(sys.path)
    yield
    assert sys.path == path


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:test_resnet", "factories_of_test:Net"])
def test_foreign_networks_same_seed_same_weights_and_the_global_stream_is_left_alone(factories, quiet_stream, name):
    a, b, c = (create_model(name, 6, seed=s, width=w) for s, w in ((1, 1.0), (1, 0.25), (2, 1.0)))
    one, two, three = (m.state_dict() for m in (a, b, c))
    assert all(torch.equal(one[k], two[k]) for k in one) and not a.training
    assert any(not torch.equal(one[k], three[k]) for k in one if one[k].ndim > 1)
    with torch.inference_mode():
        assert a(torch.zeros(3, 3, 32, 32)).shape == (3, 6)
    assert all(p.is_contiguous(memory_format=layout_of(a)) for p in a.parameters() if p.ndim == 4)


def test_a_network_of_torchvision_is_torchvisions_own():
    ours = create_model("torchvision:shufflenet_v2_x0_5", 10)
    theirs = get_model("shufflenet_v2_x0_5", num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    run_both(ours, theirs)
    with torch.random.fork_rng():  # its own initialization, too
        torch.manual_seed(4)
        theirs = get_model("mobilenet_v3_small", num_classes=10).state_dict()
    ours = create_model("torchvision:mobilenet_v3_small", 10, seed=4).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_image_sizes_reach_those_that_need_them():
    with torch.inference_mode():
        for name in ("torchvision:vit_b_32", "timm:test_vit"):
            assert create_model(name, 4, image_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_no_answers_but_logits_even_in_training():
    model = create_model("torchvision:googlenet", 5)
    assert model.train()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(("name", "classes"), [("Net", 6), ("other", 6), ("nothing", 5), ("options", 6), ("ready", 7), ("Maker.deep", 6),
                                               ("training", 6), ("volumes", 6)])
def test_factories_of_ones_own(factories, name, classes):
    model = create_model(f"factories_of_test:{name}", classes)
    assert not any(m.training for m in model.modules()) and model(torch.zeros(4, 3, 32, 32)).shape == (4, classes)


def test_trained_weights_are_kept_and_told_from_fresh_ones(factories):
    import importlib

    model = create_model("factories_of_test:ready", 7, seed=1)
    ready = importlib.import_module("factories_of_test").ready
    assert model is not ready and all(torch.equal(v, ready.state_dict()[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in ready.parameters()]
    answers = {name: brings_weights(f"factories_of_test:{name}", 7) for name in ("ready", "constant", "Net", "other")}
    assert answers == {"ready": True, "constant": True, "Net": False, "other": False}
    assert not brings_weights("resnet18", 7) and not brings_weights("torchvision:alexnet", 7)


@pytest.mark.parametrize(("name", "size", "message"), [
    ("torchvision:resnet19", 32, "unknown model 'torchvision:resnet19': did you mean 'torchvision:resnet18'.*list models 'torchvision:"),
    ("timm:resnet_18", 32, "did you mean 'timm:resnet18'"), ("torchvison:resnet18", 32, "did you mean 'torchvision:resnet18'"),
    ("mobilenet_v3_small", 32, "did you mean 'torchvision:mobilenet_v3_small'"), ("torchvision:", 32, "unknown model"),
    ("torchvision:fasterrcnn_resnet50_fpn", 32, "unknown model"),
    ("torchvision:inception_v3", 32, r"inception_v3 cannot take 32 px images \(.*made for 75 px or more; give larger images"),
    ("torchvision:vit_b_16", 40, r"vit_b_16 cannot take 40 px images \("),
    ("timm:vit_tiny_patch16_224", 8, "cannot take 8 px images.*made for 224"),
    ("nowhere.net:make", 32, "unknown model 'nowhere.net:make'.*current directory"),
    (":make", 32, "unknown model"), ("x:", 32, "unknown model"),
    ("net.py:make", 32, "net.py is a file; expected a module, e.g. net:make"), ("a/b/net.py:make", 32, "e.g. a.b.net:make"),
    ("factories_of_test:ohter", 32, "unknown factory in factories_of_test 'ohter': did you mean 'other'"),
    ("factories_of_test:number", 32, "is a int; expected a callable"),
    ("factories_of_test:needs", 32, "did not build a network.*TypeError.*'width'"),
    ("factories_of_test:fails", 32, r"did not build a network \(ValueError: no\)"),
    ("factories_of_test:answers", 32, "returned dict; expected a torch.nn.Module"),
    ("factories_of_test:nothing", 32, r"outputs of shape \(5,\) for an image; expected 6 logits, one per class"),
    ("factories_of_test:many", 32, "the network returned a dict with 'out'; expected logits"),
    ("factories_of_test:Net", 2, "cannot take 2 px images"), ("broken_of_test:make", 32, "No module named 'nothing_like_this"),
])
def test_networks_that_cannot_be_had(factories, quiet_stream, name, size, message):
    with pytest.raises(ArchrepairError) as caught:
        create_model(name, 6, image_size=size)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for act in (lambda: create_model("timm:resnet18", 10), lambda: list_models("timm:*"), lambda: outline("timm:resnet18")):
        with pytest.raises(ArchrepairError, match=r"need timm: pip install 'archrepair\[timm\]'"):
            act()


def test_tags_of_timms_weights_are_part_of_a_name():
    a, b = (create_model(f"timm:{name}", 10) for name in ("test_resnet.r160_in1k", "test_resnet"))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_lists_of_libraries():
    assert list_models("torchvision:mobile*") == [f"torchvision:mobilenet_{v}" for v in ("v2", "v3_large", "v3_small")]
    assert list_models("torchvision:none*") == [] and "timm:test_vit" in list_models("timm:test_*")
    with pytest.raises(ArchrepairError, match="unknown library of networks 'tochvision': did you mean 'torchvision'"):
        list_models("tochvision:*")


def test_outlines_have_shapes_and_cost_nothing(factories):
    started = time.process_time()
    large = outline("torchvision:vit_h_14")
    assert sum(p.numel() for p in large.parameters()) > 6e8 and all(p.is_meta for p in large.parameters())
    assert time.process_time() - started < 5
    assert [k for k in outline("resnet18").state_dict()] == [k for k in create_model("resnet18", 10).state_dict()]
    assert outline("factories_of_test:nothing")(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    for name in ("resnet_18", "torchvision:resnet_18", "nowhere:x"):
        with pytest.raises(ArchrepairError, match="unknown model"):
            outline(name)


def test_build_is_for_names_with_a_colon(factories):
    one, two = build("factories_of_test:Net", 4, 16, seed=2), create_model("factories_of_test:Net", 4, image_size=16, seed=2)
    assert torch.equal(one.conv.weight, two.conv.weight)


@pytest.fixture(scope="module")
def narrow():
    return scramble(create_model("resnet18", 10, width=0.125))


def test_a_copy_of_a_network_is_independent(narrow, untouched):
    with untouched(narrow):
        other = copy.deepcopy(narrow)
        other.conv1.weight.data.zero_()


def test_models_are_listed_by_pattern():
    assert list_models("resnet*") == ["resnet18", "resnet50", "resnet101"] and len(list_models()) == 11
    names = list_models("torchvision:mobilenet_v3*")
    assert names == ["torchvision:mobilenet_v3_large", "torchvision:mobilenet_v3_small"] and not list_models("nothing*")
    with pytest.raises(ArchrepairError, match="library"):
        list_models("torchvison:*")
