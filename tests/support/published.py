"""A network that others trained, and the images it was trained on, where both are at hand."""
import warnings

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet, Normalize
from archrepair.networks.models import create_model
from archrepair.networks.weights import load_weights
from support import ROOT

WEIGHTS = ROOT / "data" / "weights" / "resnet20-12fca82f.th"


def published_resnet(n_test: int) -> tuple[nn.Module, Normalize, ImageSet, ImageSet]:
    "The published ResNet-20, its transform, CIFAR-10's training images and the first test images; skips, loudly, without files."
    try:
        if not WEIGHTS.exists():
            raise ArchrepairError(f"{WEIGHTS.relative_to(ROOT)} is not there")
        train, test = (load_dataset("cifar10", split, root=ROOT / "data", download=False) for split in ("train", "test"))
    except ArchrepairError as error:
        warnings.warn(f"NOT TESTED on the published ResNet-20 and CIFAR-10: {error}", stacklevel=2)
        pytest.skip("needs data/weights and data/cifar10")
    network = create_model("cifar-resnet20", 10, image_size=32).eval()
    load_weights(network, str(WEIGHTS))
    return network, Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), train, test.select(torch.arange(n_test))
