"""What a repair costs: passes counted by hand, time and memory noted, operations counted by torch."""
import pytest
import torch
from torch import nn

from archrepair.training.cost import CostMeter, work


def test_cost_by_hand():
    meter = CostMeter()
    meter.add(100, 50)
    meter.add(10, share=0.25)
    assert (meter.forwards, meter.backwards) == (102.5, 50)
    with pytest.raises(ZeroDivisionError), meter.running():
        raise ZeroDivisionError
    assert meter.seconds > 0 and meter.peak_bytes > 1 << 20
    assert meter.as_dict().keys() == {"forwards", "backwards", "seconds", "cpu_seconds", "peak_bytes"}


def test_work_counts_multiplications():
    assert work(nn.Linear(10, 20, bias=False), torch.zeros(4, 10)) == 2 * 4 * 10 * 20
    assert work(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16)) == 2 * 8 * 3 * 9 * 256
