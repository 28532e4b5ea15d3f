"""Numbers in place of images, and a network small enough to train on them in no time."""
import torch
from torch import nn

from archrepair.training.rows import Features

N, D, C = 90, 6, 3


def table(seed: int = 0, n: int = N, views: int = 1) -> Features:
    "`n` random rows of `D` numbers with labels of `C` classes."
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(views, n, D, generator=draw), torch.randint(0, C, (n,), generator=draw)
    return Features(y, lambda positions, view: x[view, positions].clone(), views)


def small(dropout: float = 0.0, seed: int = 1) -> nn.Sequential:
    "Two linear layers with all that may go wrong between them: BatchNorm, a ReLU, dropout."
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, C))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.eval()
