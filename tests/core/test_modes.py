"""A network is looked at in eval mode and with torch's modes settled, and everything comes back as it was."""
import pytest
import torch
from torch import nn

from archrepair.core.modes import evaluating, settled


def test_every_module_is_restored_also_after_an_error():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(), nn.ReLU())).train()
    network[0].eval()
    network[1][0].eval()
    modes = lambda: [module.training for module in network.modules()]
    before = modes()
    assert set(before) == {True, False}
    with evaluating(network):
        assert not any(modes())
    assert modes() == before
    with pytest.raises(ZeroDivisionError), evaluating(network):
        raise ZeroDivisionError
    assert modes() == before


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("added", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("grown", torch.zeros(0))

    def forward(self, x):
        self.added += 1
        self.replaced = self.replaced + 1
        self.grown.resize_(3).fill_(1.0)
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_are_what_they_were(mode):
    network = Counting()
    before = dict(network.named_buffers())
    with evaluating(network), mode():
        network(torch.ones(1))
    assert all(network.get_buffer(name) is buffer for name, buffer in before.items())
    assert network.added == 0 and network.replaced == 0 and network.grown.shape == (0,)


def modes() -> tuple:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.zeros(1).dtype,
            torch.zeros(1).device.type)


AS_A_REPAIR_EXPECTS = (True, False, False, torch.float32, "cpu")


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
                                    lambda: torch.device("meta")], ids=["no_grad", "inference_mode", "autocast", "device"])
def test_modes_are_settled_inside_and_come_back(around):
    with around():
        before = modes()
        with settled():
            assert modes() == AS_A_REPAIR_EXPECTS
        assert modes() == before != AS_A_REPAIR_EXPECTS
        with pytest.raises(ZeroDivisionError), settled():
            raise ZeroDivisionError
        assert modes() == before


def test_the_default_type_is_settled_by_the_decorator_too():
    torch.set_default_dtype(torch.float64)
    try:
        assert settled()(modes)() == AS_A_REPAIR_EXPECTS
        assert torch.zeros(1).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
