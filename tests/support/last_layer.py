"""A method that is not in the package, written by the guide `nbs/tutorials/add_your_method.ipynb` alone."""
from dataclasses import dataclass

from torch import nn

from archrepair.baselines.parts.common import Baseline, Problem
from archrepair.core.settings import Count, NotNegative, checked
from archrepair.training.fit import Recipe


@checked
@dataclass
class LastLayer(Baseline):
    "Train the last linear layer alone on the repair set, for `epochs` passes from the learning rate `lr`."

    epochs: Count = 3
    lr: NotNegative = 0.1
    name: str = "last-layer"

    def run_method(self, problem: Problem) -> nn.Module:
        "The network with another last layer."
        network = problem.network().requires_grad_(False)
        [module for module in network.modules() if isinstance(module, nn.Linear)][-1].requires_grad_(True)
        problem.train(network, problem.rows(), Recipe(self.epochs, self.lr, seed=self.seed))
        return network


@dataclass
class Vandal(LastLayer):
    "Changes the network that it is given, which no method may."

    def repair(self, model, data, *, checkpoints=None):
        result = super().repair(model, data)
        next(model.parameters()).data.add_(1)
        return result


@dataclass
class Mute(LastLayer):
    "Returns a network and not a result."

    def repair(self, model, data, *, checkpoints=None):
        return model
