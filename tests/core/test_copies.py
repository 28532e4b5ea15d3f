"A copy is a network of its own, whatever it holds; only what Python cannot copy is shared."
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from archrepair.core.copies import duplicate
from archrepair.core.errors import ArchrepairError


def holding(thing: object) -> nn.Module:
    network = nn.Linear(3, 2)
    network.thing = thing
    return network


THINGS = [threading.Lock(), threading.RLock(), (i for i in range(2)), torch]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)
def test_what_cannot_be_copied_is_shared_wherever_it_is(thing):
    network = holding({"at": [thing, torch.ones(2)]})
    copied = duplicate(network)
    assert copied.thing["at"][0] is thing and copied.thing is not network.thing
    assert copied.thing["at"][1] is not network.thing["at"][1] and torch.equal(copied.thing["at"][1], torch.ones(2))
    assert copied.weight is not network.weight and torch.equal(copied.weight, network.weight)


def test_an_open_file_is_shared(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        assert duplicate(holding(file)).thing is file


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
                                    torch.nn.utils.spectral_norm])
def test_computed_weights_lose_their_history_and_are_computed_again(change):
    network, x = change(nn.Linear(3, 2)), torch.ones(1, 3)
    assert network(x).requires_grad and network.weight.grad_fn is not None
    copied = duplicate(network.eval())
    assert copied.weight.grad_fn is None and torch.equal(copied(x), network(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert not torch.allclose(copied(x), network(x))  # by parameters of its own


def test_a_tensor_with_a_history_in_a_list_is_copied_as_numbers():
    features = torch.ones(2, requires_grad=True) * 2
    copied = duplicate(holding([features])).thing[0]
    assert copied is not features and torch.equal(copied, features) and not copied.requires_grad


def test_the_memo_says_what_takes_the_place_of_a_part():
    network, other = nn.Sequential(nn.Linear(3, 2), holding(threading.Lock())), nn.Identity()
    copied = duplicate(network, {id(network[0]): other})
    assert copied[0] is other and copied[1].thing is network[1].thing and copied[1] is not network[1]


class Single(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me\nand no more")


def test_a_module_that_refuses_is_one_line():
    with pytest.raises(ArchrepairError, match=r"Sequential cannot be copied \(TypeError: there is one of me\); expected") as caught:
        duplicate(nn.Sequential(Single(3, 2)))
    assert "\n" not in str(caught.value)
