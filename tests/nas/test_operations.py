"Table 3's candidates: silent at birth, of the right shape, and never drawing from the global random stream."
import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.graph import extract
from archrepair.nas.operations import OPERATIONS, make_operation, stride_between
from support.families import preserved

NAMES = [name for name, op in OPERATIONS.items() if op.make]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size, stride", [(8, 1), (8, 2), (7, 2), (7, 3), (1, 1)])
def test_silent_in_both_modes_and_of_the_right_shape(name, size, stride):
    op = make_operation(name, 6, 4, stride, generator=seeded())
    x = torch.randn(3, 6, size, size, generator=seeded(1))
    for mode in (False, True):
        y = op.train(mode)(x)
        assert y.shape == (3, 4, -(-size // stride), -(-size // stride)) and bool((y == 0).all())
    torch.nn.init.ones_(op[-1].weight)
    assert size == 1 or float(op(x).detach().abs().max()) > 0.1


def test_average_pooling_does_not_count_the_padding():
    op = make_operation("avg_pool", 4, 4, generator=seeded())
    assert torch.equal(op[0](torch.ones(1, 4, 5, 5)), torch.ones(1, 4, 5, 5))


def test_weights_come_from_the_generator_alone():
    state = torch.random.get_rng_state()
    a, b, c = (make_operation("sep_conv", 4, 8, 2, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a[2].weight, b[2].weight) and not torch.equal(a[2].weight, c[2].weight)


@pytest.mark.parametrize("name", ["none", "conv_7x7"])
def test_operations_without_a_module_are_refused(name):
    with pytest.raises(ArchrepairError, match="unknown operation"):
        make_operation(name, 4, 4, generator=seeded())

STRIDES = [((9, 9), (9, 9), 1), ((9, 9), (5, 5), 2), ((9, 8), (5, 4), 2), ((9, 9), (3, 3), 3), ((7, 7), (1, 1), 7), ((7, 9), (4, 5), 2),
           ((9, 9), (4, 4), None), ((9, 9), (9, 5), None), ((8, 8), (8, 4), None), ((4, 4), (8, 8), None)]


@pytest.mark.parametrize("source, target, stride", STRIDES)
def test_strides_between_maps(source, target, stride):
    assert stride_between(source, target) == stride
    if stride:
        block = nn.Sequential(nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(target)).eval()
        x = torch.randn(3, 4, *source, generator=torch.Generator().manual_seed(0))
        graph = extract(block, x)
        assert graph.edges[0].stride == stride
        preserved(block, x, graph, 2)
