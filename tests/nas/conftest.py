"""What several tests of the search package ask for."""
import pytest
import torch


@pytest.fixture
def forked():
    "Constructors of layers draw from the global stream; here that is put back."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
