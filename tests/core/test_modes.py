"""A network is looked at in eval mode, and every module of it comes back in the mode that it was in."""
import pytest
from torch import nn

from archrepair.core.modes import evaluating


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
