"""A network in which each kind of neuron occurs."""
import torch
from torch import nn


class Net(nn.Module):
    "A stem, two blocks (conv-BN-ReLU twice, one with a shortcut; conv without BN), a head. Shortcuts and in-place ReLUs as asked."

    def __init__(self, inplace=True, functional=False, norm=True, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 4, 3, 2, 1)
            bn = nn.BatchNorm2d if norm else (lambda c: nn.Identity())
            self.one = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, 1, 1), "bn": bn(6), "short": nn.Conv2d(4, 6, 1)})
            self.two = nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3, 2, 1), "bn": bn(8)})
            self.head = nn.Linear(8, 3)
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.weight.data.uniform_(0.5, 1.5), m.bias.data.uniform_(-0.5, 0.5)
                    m.running_mean.uniform_(-0.3, 0.3), m.running_var.uniform_(0.3, 1.5)
        self.relu = nn.ReLU(inplace=inplace)  # one module, used three times
        self.functional = functional

    def forward(self, x):
        relu = torch.relu if self.functional else self.relu
        x = relu(self.stem(x))
        x = relu(self.one["bn"](self.one["conv"](x)) + self.one["short"](x))
        x = relu(self.two["bn"](self.two["conv"](x)))
        return self.head(x.mean((2, 3)))
