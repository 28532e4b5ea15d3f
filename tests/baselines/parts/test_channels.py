"Channels: what every neuron answers on every image, and training only some of them."
import pytest
import torch
from torch import nn

from archrepair.baselines.domains import as_features
from archrepair.baselines.parts.channels import activations, last_layer, only_rows, own_parameters
from archrepair.core.errors import ArchrepairError
from archrepair.networks.models import create_model
from archrepair.networks.neurons import wire
from archrepair.training.evaluation import predict
from archrepair.training.rows import image_features
from support.families import NETWORKS
from support.states import assert_same_state, state_of


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_what_the_network_computes(name, digits_test, problem):
    network = create_model(name, 10, width=0.125, stem_stride=2)
    rows = image_features(digits_test.select(torch.arange(6)), problem.transform)
    x = rows.batch(torch.arange(6))
    wiring, before = wire(network, x[:1]), state_of(network)
    states, logits = activations(network, rows, wiring, batch_size=4)
    assert_same_state(before, network)
    torch.testing.assert_close(logits, predict(network, rows), rtol=1e-4, atol=1e-5)
    assert {layer: tuple(s.shape) for layer, s in states.items()} == {layer: (6, size) for layer, size in wiring.layers.items()}
    layer = list(wiring.layers)[len(wiring.layers) // 2]
    module = next(m for m, owners in wiring.owners.items() if layer in owners)
    seen = []
    handle = network.get_submodule(module).register_forward_hook(lambda m, a, out: seen.append(out.clone().clamp_min(0).flatten(2).mean(2)))
    with torch.no_grad():
        network(x)
    handle.remove()
    torch.testing.assert_close(states[layer], seen[0], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_has_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            self.seen = [self.layer(x)]
            self.seen.append(self.layer(self.seen[0].relu()))
            return self.head(self.seen[1])

    network, x = Twice().eval(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    wiring = wire(network, x[:1])
    states, _ = activations(network, as_features(x), wiring)
    torch.testing.assert_close(states["layer"], sum(z.detach().relu() for z in network.seen) / 2)
    assert last_layer(network, wiring, x[:1]) == ("head", 1)


def test_own_parameters_are_rows_of_the_layer_and_of_its_norm(problem):
    x = torch.zeros(1, 3, 32, 32)
    wiring = wire(problem.network, x)
    for layer, size in wiring.layers.items():
        own = own_parameters(problem.network, wiring, layer)
        assert len(own) == 3 and all(len(p) == size for p in own.values())
    vgg = create_model("vgg16", 10, width=0.125, stem_stride=2)
    assert len(own_parameters(vgg, wire(vgg, x), "features.block1.0")) == 4
    computed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(ArchrepairError, match="the weight of layer 1 is computed"):
        own_parameters(computed, wire(computed, torch.zeros(1, 3, 2, 2)), "1")


def test_only_rows_move_whatever_the_optimizer_does():
    layer = nn.Conv2d(2, 5, 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    rows = torch.tensor([1, 4])
    with only_rows(layer.parameters(), rows) as restore:
        for _ in range(4):
            optimizer.zero_grad()
            layer(torch.ones(1, 2, 4, 4)).square().sum().backward()
            assert not layer.weight.grad[[0, 2, 3]].any()
            optimizer.step()
            restore()
    for name, p in layer.named_parameters():
        moved = (p.detach() != before[name]).flatten(1).any(1) if p.ndim > 1 else p.detach() != before[name]
        assert moved.tolist() == [False, True, False, False, True]
        assert not p._backward_hooks
