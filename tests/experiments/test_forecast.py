"""What a repair will take: counted passes, a measured pass, and the bytes of what it keeps."""
import torch
from torch import nn

from archrepair.experiments.forecast import (
    LIBRARIES_BYTES,
    available_memory,
    disk_needed,
    existing_part,
    free_disk,
    in_bytes,
    memory_needed,
    saved_bytes,
    time_pass,
)
from archrepair.networks.models import create_model


def test_a_pass_is_measured_on_networks_that_return_more_than_logits():
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x.flatten(1))}

    seconds = time_pass(Named(12, 3), torch.zeros(4, 3, 2, 2))
    assert 0 < seconds < 1


def test_what_a_step_keeps_is_counted_and_grows_with_the_batch():
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    one, ten = (saved_bytes(layers, torch.zeros(n, 8)) for n in (1, 10))
    assert ten == 10 * one == 10 * 2 * 8 * 4  # the input of the first layer, and the ReLU's output, which enters the second


def test_memory_has_a_part_for_everything_that_fills_it():
    network, x = create_model("resnet18", 10, width=0.125), torch.zeros(2, 3, 32, 32)
    needed = lambda **sizes: memory_needed(network, x, **{"image_bytes": 0, "feature_bytes": 0, "batch_size": 2} | sizes)
    assert needed() > LIBRARIES_BYTES
    assert needed(image_bytes=1000) - needed() == 2000 and needed(feature_bytes=77) - needed() == 77
    assert needed(batch_size=4) - needed() == 2 * saved_bytes(network, x)


def test_a_training_beforehand_writes_more():
    network = create_model("resnet18", 10, width=0.125)
    weights = sum(t.nbytes for t in network.state_dict().values())
    assert disk_needed(network, trained=True) - disk_needed(network, trained=False) == 4 * weights


def test_the_machine_is_asked(tmp_path):
    assert existing_part(tmp_path / "a" / "b") == tmp_path and free_disk(tmp_path / "a" / "b") > 0
    assert available_memory() is None or available_memory() > 1 << 20


def test_numbers_as_one_says_them():
    assert [in_bytes(x) for x in (10, 5_500_000, 170_498_071, 2_340_000_000)] == ["0.1 MB", "5.5 MB", "170 MB", "2.3 GB"]
