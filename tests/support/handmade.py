"Blocks written by hand, and feature maps that enter them."
import torch
import torch.nn.functional as F
from torch import nn


def maps(channels=4, size=9, n=3):
    "Features n×channels×size×size."
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    "Two convolutions; `how` says what happens to them."

    def __init__(self, how=None):
        super().__init__()
        self.first, self.second, self.relu, self.how = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True), how

    def forward(self, x):
        return self.how(self, x)


class Functional(nn.Module):
    "A residual unit as people write them by hand."

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class Inverted(nn.Module):
    "Three convolutions of different widths, no chain of modules."

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))))
