"Table 3's candidates: silent at birth, of the right shape, and never drawing from the global random stream."
import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.graph import extract
from archrepair.nas.operations import FILTERS, OPERATIONS, make_filter, make_operation, stride_between
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


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(3, 6, 8, 8), (2, 4, 7, 5), (2, 5, 1, 1), (1, 3, 2, 9)])
def test_filters_begin_as_the_identity_and_can_leave_it(name, shape):
    state = torch.random.get_rng_state()
    made, x = make_filter(name, shape[1], generator=seeded()), torch.randn(shape, generator=seeded(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for mode in (True, False):
        assert torch.equal(made.train(mode)(x), x)
    (made(x) * x.abs()).sum().backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    one_pixel = shape[2] * shape[3] == 1
    assert any(g.any() for g in gradients) or (one_pixel and name != "squeeze")


def test_a_threshold_takes_away_what_is_fine_and_keeps_what_is_coarse():
    smooth = torch.linspace(0, 1, 16).expand(1, 2, 16, 16).contiguous()
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    noisy = smooth + 0.1 * checks
    made = make_filter("shrink", 2, generator=seeded())
    set_to = lambda *values: [threshold.fill_(value) for threshold, value in zip(made.thresholds, values)]
    with torch.no_grad():
        set_to(0.05, 0.05)
        inside = (..., slice(4, 12), slice(4, 12))
        error = lambda maps: float((maps - smooth)[inside].abs().max())
        assert error(made(noisy)) < 0.6 * error(noisy) and error(made(smooth)) < 1e-5
        set_to(0.5, 0.0)  # more than there is: nothing is turned around
        assert float((made(noisy) - nn.functional.avg_pool2d(noisy, 3, 1, 1, count_include_pad=False)).abs().max()) < 1e-6
        set_to(-0.05, -0.05)
        assert error(made(noisy)) > error(noisy)


def test_an_instance_share_of_one_forgets_contrast():
    made, x = make_filter("instance", 4, generator=seeded()), torch.randn(2, 4, 6, 6, generator=seeded(1))
    nn.init.ones_(made.share)
    assert torch.allclose(made(x), made(0.3 * x + 1), atol=1e-3)


def test_squeeze_multiplies_channels_only():
    made, x = make_filter("squeeze", 4, generator=seeded()), torch.rand(2, 4, 6, 6, generator=seeded(1)) + 0.1
    nn.init.normal_(made.up.weight, generator=seeded(2))
    factors = made(x) / x
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), atol=1e-5) and float(factors.detach().std()) > 0.01


def test_filters_are_drawn_from_the_generator_and_an_unknown_one_is_named():
    first, again, other = (make_filter("squeeze", 8, generator=seeded(seed)).down.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ArchrepairError, match="unknown filter 'shrinks': did you mean 'shrink'"):
        make_filter("shrinks", 4, generator=seeded())
