"One function decides the layout, whatever the processor; and the gradients that depend on it, in processes that may die of a wrong one."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from archrepair.nas.graph import extract
from archrepair.core.layout import LANES, is_narrow, lay_out, layout_of, make_safe
from archrepair.nas.operations import OPERATIONS, make_operation
from archrepair.nas.supernet import SuperNet
from archrepair.networks.blocks import split
from archrepair.networks.models import create_model
from support.narrow import Network

TESTS = Path(__file__).parent.parent
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(("layer", "narrow"), [
    (nn.Conv2d(LANES - 1, 32, 1, 2), True), (nn.Conv2d(LANES, 32, 1, 2), False), (nn.Conv2d(3, 64, 1, (1, 2)), True),
    (nn.Conv2d(8, 16, 1), False), (nn.Conv2d(8, 16, 3, 2, 1), False), (nn.Conv2d(8, 16, (1, 3), 2), False),
    (nn.Conv2d(32, 32, 1, 2, groups=4), True),
    (nn.Conv2d(64, 64, 1, 2, groups=4), False), (nn.Conv2d(64, 64, 1, 2, groups=64), True),
    (nn.ConvTranspose2d(32, 8, 1, 2), True),
    (nn.ConvTranspose2d(8, 32, 1, 2), False), (nn.Conv1d(8, 16, 1, 2), False), (nn.Linear(8, 16), False)], ids=str)
def test_a_narrow_layer_is_a_strided_pixel_with_few_channels_per_group(layer, narrow):
    assert is_narrow(layer) == narrow
    assert layout_of(nn.Sequential(nn.Sequential(layer), nn.Linear(2, 2))) == (CONTIGUOUS if narrow else CHANNELS_LAST)


def test_the_layout_is_that_of_all_parts_together_and_no_gpus_concern():
    narrow, wide = nn.Conv2d(8, 16, 1, 2), nn.Conv2d(64, 16, 1, 2)
    assert layout_of(wide, narrow) == layout_of(narrow, wide) == CONTIGUOUS and layout_of(wide) == CHANNELS_LAST
    assert layout_of(narrow.to("meta")) == CHANNELS_LAST and layout_of(nn.ReLU()) == CHANNELS_LAST
    assert layout_of(nn.Conv3d(64, 64, 3)) == CONTIGUOUS


@pytest.mark.parametrize(("name", "width", "layout"), [
    ("resnet18", 1 / 8, CONTIGUOUS), ("resnet18", 1 / 4, CHANNELS_LAST), ("vgg16", 1 / 8, CHANNELS_LAST),
    ("torchvision:resnet18", 1, CHANNELS_LAST)])
def test_networks_are_built_in_their_layout(name, width, layout):
    network = create_model(name, 5, width=width)
    assert layout_of(network) == layout
    for p in network.parameters():
        assert p.stride() == lay_out(p, layout).stride()


def test_no_candidate_is_narrow():
    generator = torch.Generator().manual_seed(0)
    for name in OPERATIONS.keys() - {"none"}:
        for stride in (1, 2):
            assert layout_of(make_operation(name, 4, 8, stride, generator=generator)) == CHANNELS_LAST, (name, stride)


@pytest.mark.parametrize(("width", "layout"), [(1 / 8, CONTIGUOUS), (1 / 4, CHANNELS_LAST)])
def test_a_relaxed_block_follows_its_layers(width, layout):
    cut = split(create_model("resnet18", 5, width=width), "layer2")
    x = cut.features(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=layout))
    graph = extract(cut.block, x)
    supernet = SuperNet(cut.block, graph, channel_k=None, generator=torch.Generator().manual_seed(0))
    convolutions = [m for m in supernet.modules() if isinstance(m, nn.Conv2d)]
    seen = []
    for m in convolutions:
        m.register_forward_hook(lambda m, args, y: seen.extend([*args, y]))
    y = supernet(x, torch.full((len(graph.edges), supernet.coefficient_index.max() // len(graph.edges)), 0.5))
    assert seen and all(z.stride() == lay_out(z, layout).stride() for z in [*seen, y])


def test_laying_out_reaches_tensors_that_are_contiguous_in_both_ways():
    kernel = torch.zeros(8, 4, 1, 1).to(memory_format=CHANNELS_LAST)
    assert kernel.stride() == (4, 1, 4, 4) and lay_out(kernel, CONTIGUOUS).stride() == (4, 1, 1, 1)
    part = torch.arange(48.0).view(2, 6, 2, 2)[:, 1:3]  # with gaps
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        packed = lay_out(part, layout)
        assert torch.equal(packed, part) and packed.is_contiguous(memory_format=layout) and lay_out(packed, layout) is packed
    assert lay_out(torch.zeros(4, 3).t(), CHANNELS_LAST).is_contiguous()


def test_a_safe_network_stays_as_it_is():
    for wide in (Network(16), Network(16).to(memory_format=CHANNELS_LAST)):
        before = [p.stride() for p in wide.parameters()]
        assert [p.stride() for p in make_safe(wide).parameters()] == before
    narrow = Network(4).to(memory_format=CHANNELS_LAST)
    weights = list(narrow.parameters())
    assert make_safe(narrow) is narrow and all(p is q for p, q in zip(narrow.parameters(), weights))  # an optimizer still knows them
    assert all(p.stride() == torch.empty(p.shape).stride() for p in weights)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_gradients_of_narrow_layers_are_plain_sums(threads, isa):
    "For a user's channels-last network, by every way in which the package takes a weight gradient."
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "ONEDNN_MAX_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "support.narrow", "3", "8", "15"]
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    for channels, result in json.loads(done.stdout).items():
        assert result["finite"] and result["layout"] == str(CONTIGUOUS), channels
        assert max(result["errors"].values()) < 1e-4, (channels, result["errors"])
