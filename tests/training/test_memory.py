"""A batch that does not fit is divided: the same gradients, said once, and one line where nothing fits."""
import copy

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError, note_once
from archrepair.training.fit import Recipe, fit
from archrepair.training.memory import Portions, lacks_memory
from archrepair.training.rows import Rows
from support.memory import fits_only
from support.tables import D, small, table

CPU = torch.device("cpu")


def sizes_that_fit(most: int, n: int, portions: Portions, undone: list | None = None) -> list[int]:
    def do(rows: slice) -> int:
        if rows.stop - rows.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows.stop - rows.start

    return portions.each(n, do, CPU, lambda: undone is not None and undone.append(n))


@pytest.fixture(autouse=True)
def say_again():
    note_once.cache_clear()


def test_a_batch_is_halved_until_it_fits_and_stays_divided(recwarn):
    portions, undone = Portions(), []
    assert sizes_that_fit(100, 64, portions, undone) == [64] and not undone and not recwarn.list
    assert sizes_that_fit(16, 64, portions, undone) == [16] * 4 and undone == [64, 64]
    assert sizes_that_fit(16, 63, portions, undone) == [16, 16, 15, 16] and undone == [64, 64]
    said = "the memory of cpu does not hold a batch of 64 images; it is done in 4 portions from now on"
    assert [str(warning.message) for warning in recwarn] == [said]


@pytest.mark.parametrize(("n", "least", "size"), [(8, 1, "1 image"), (9, 2, "[23] images"), (2, 2, "2 images"), (1, 1, "1 image")])
def test_where_the_smallest_does_not_fit_it_is_one_line(n, least, size):
    with pytest.raises(ArchrepairError, match=f"does not hold what the network makes of {size} at a time; expected smaller"):
        sizes_that_fit(0, n, Portions(least))


@pytest.mark.parametrize(("error", "lacks"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
    (RuntimeError("shapes cannot be multiplied"), False), (ValueError("out of range"), False)])
def test_lack_of_memory_is_told_from_other_errors(error, lacks):
    assert lacks_memory(error) == lacks


def test_other_errors_are_passed_on():
    def fail(rows: slice) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Portions().each(4, fail, CPU)


def test_portions_add_up_to_the_gradient_of_the_batch(monkeypatch):
    "Without BatchNorm the weights are those that whole batches give, for batches of any size and with imitation."
    def train() -> tuple[nn.Module, list]:
        model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        rows = table()
        answers = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(0))
        history = fit(model, Rows([rows], answers, torch.ones(len(rows))), Recipe(epochs=3, lr=0.1, batch_size=37, imitation=0.5))
        return model, [entry["loss"] for entry in history.epochs]

    whole, losses = train()
    tried = fits_only(monkeypatch, 10)
    divided, again = train()
    assert tried[37] == 1 and max(size for size in tried if size <= 10) == 10 - 1 + (10 in tried)
    assert losses == pytest.approx(again, abs=1e-5)
    for one, other in zip(whole.parameters(), divided.parameters()):
        assert torch.allclose(one, other, atol=1e-5)


def test_batchnorm_is_left_two_rows(monkeypatch):
    fits_only(monkeypatch, 1)
    with pytest.raises(ArchrepairError, match="[23] images at a time"):
        fit(small(), Rows([table()]), Recipe(epochs=1, batch_size=16))


def test_what_is_not_trained_sets_no_fits_only(monkeypatch):
    tried, model = fits_only(monkeypatch, 1), small()
    fit(model, Rows([table(n=8)]), Recipe(epochs=1, batch_size=4), trainable=[model[4]])
    assert tried[1] == 8


def test_the_model_is_whole_after_a_failed_training(monkeypatch):
    fits_only(monkeypatch, 0)
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArchrepairError):
        fit(model, Rows([table()]), Recipe(epochs=1, batch_size=16))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
