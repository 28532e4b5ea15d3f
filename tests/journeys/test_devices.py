"""Devices and types are strings or torch's own, wherever one can be given."""
import pytest
import torch

from archrepair import ArchRepair, create_model, localize
from archrepair.core.errors import ArchrepairError


def test_devices_are_strings_or_torchs_own(problem):
    one, two = (localize(problem.network, problem.scenario.data, device=device) for device in ("cpu", torch.device("cpu")))
    assert one.to_dict() == two.to_dict()
    assert next(create_model("resnet18", 10, width=0.125, device=torch.device("meta")).parameters()).device.type == "meta"
    from archrepair.experiments.originals import pick_device

    assert pick_device(torch.device("cpu")) == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ArchrepairError, match="device"):
        pick_device("gpu")


def test_types_are_torchs_own(problem):
    assert next(create_model("resnet18", 10, width=0.125, dtype=torch.float64).parameters()).dtype == torch.float64
    data = problem.scenario.data
    assert localize(problem.network, data, precision=torch.float32).to_dict() == localize(problem.network, data, precision="fp32").to_dict()
    assert localize(problem.network, data, precision=torch.bfloat16).settings["precision"] == "bf16"
    with pytest.raises(ArchrepairError, match="unknown precision 'torch.float16'"):
        localize(problem.network, data, precision=torch.float16)
    doubled = create_model("resnet18", 10, width=0.125, stem_stride=2, dtype=torch.float64)
    for act in (lambda: localize(doubled, data), lambda: ArchRepair(search_epochs=0, block="layer4").repair(doubled, data)):
        with pytest.raises(ArchrepairError, match="holds float64 weights; expected float32"):
            act()
