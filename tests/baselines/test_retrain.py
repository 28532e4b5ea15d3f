"Retraining everything: plain fine-tuning, under the frame of a method."
import pytest

from archrepair.baselines.retrain import Retrain
from archrepair.core.errors import ArchrepairError
from archrepair.repair.finetuning import finetune
from support.states import same_state


@pytest.mark.parametrize("views", [{}, {"views": 2, "failure_views": 2}])
def test_retrain_is_fine_tuning_of_everything(_problem, views):
    result = Retrain(epochs=1, **views).repair(_problem.network, _problem.scenario.data)
    plain = finetune(_problem.network, _problem.scenario.data, level="network", epochs=1, precision=result.config["precision"], **views)
    assert same_state(plain.model, result.candidates["repaired"])
    assert result.validation["repaired"] == plain.val and result.config["point"] == plain.point
    assert result.cost.backwards == plain.cost.backwards > 0 and result.block is None


def test_without_epochs_nothing_changes(_problem):
    result = Retrain(epochs=0).repair(_problem.network, _problem.scenario.data)
    assert same_state(result.candidates["repaired"], _problem.network) and result.cost.backwards == 0


@pytest.mark.parametrize(("settings", "message"), [
    ({"preset": "papre"}, "did you mean 'paper'"), ({"epochs": -1}, "epochs is -1"), ({"views": 0}, "views is 0")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        Retrain(**settings)
