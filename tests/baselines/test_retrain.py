"Retraining everything: plain fine-tuning, under the frame of a method."
import pytest
import torch
from torch import nn
from archrepair.core.errors import ArchrepairError
from archrepair.experiments.methods import method_class


def same(one: nn.Module, two: nn.Module) -> bool:
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_retrain_is_fine_tuning_of_everything(_problem, repaired):
    from archrepair.repair.finetuning import finetune

    result = repaired("retrain").result
    plain = finetune(_problem.network, _problem.scenario.data, level="network", epochs=1, precision=result.config["precision"])
    assert same(plain.model, result.candidates["repaired"])
    assert result.validation["repaired"] == plain.val and result.config["point"] == plain.point
    assert result.cost.backwards == plain.cost.backwards > 0 and result.block is None
    none = make("retrain", epochs=0).repair(_problem.network, _problem.scenario.data)
    assert same(none.candidates["repaired"], _problem.network) and none.cost.backwards == 0
    views = make("retrain", failure_views=2).repair(_problem.network, _problem.scenario.data)
    assert views.cost.backwards > result.cost.backwards


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("retrain", {"preset": "papre"}, "did you mean 'paper'"), ("retrain", {"epochs": -1}, "epochs is -1"),
    ("retrain", {"views": 0}, "views is 0"), ("surgical", {"variant": "blok"}, "did you mean 'block'"),
    ("surgical", {"preset": "x"}, "unknown preset"), ("surgical", {"epochs": 1.0}, "epochs is 1.0"),
    ("surgical", {"variant": "auto-rgn", "block": "layer1"}, "tunes every layer and takes no block")])
def test_controls_check_their_settings(name, settings, message):
    with pytest.raises(ArchrepairError, match=message):
        method_class(name)(**settings)
