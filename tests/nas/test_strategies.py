"Strategies by name: every one starts from the original, and searches that resume, warm up or decide by perturbation."
import inspect

import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.strategies import STRATEGIES, make_strategy
from support.searches import quick, started


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_scores_put_the_original_first_at_the_start(name):
    strategy, *_ = started(name)
    assert [c in ("original", "none") for c in strategy.decide()] == [True] * len(strategy.mask)
    assert strategy.scores().shape == strategy.mask.shape and bool((strategy.scores()[~strategy.mask.cpu()] == 0).all())


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_says_in_one_line_what_it_is(name):
    summary = inspect.getdoc(STRATEGIES[name]).splitlines()[0]
    assert STRATEGIES[name].name == name and summary.endswith(".") and len(summary) < 140


@pytest.mark.parametrize(("name", "options", "message"), [
    ("gradient", {}, "unknown strategy"), ("snas", {"tau": 1}, "unknown option of snas .tau.: known: arch_lr, confidence"),
])
def test_unknown_names_and_options(name, options, message):
    with pytest.raises(ArchrepairError, match=message):
        make_strategy(name, **options)


@pytest.mark.parametrize("name", ["snas", "bayesnas"])
def test_one_level_strategies_resume(name, tmp_path, monkeypatch):
    "Stopped after the first step of an epoch, draws and posteriors go on from there."
    from archrepair.training import fit as training

    straight = quick(strategy=name)
    save, places = training._save, []

    def asked(content, path):
        save(content, path)
        places.append(content.get("place"))
        if len(places) == 2:
            assert training.STOP.ask(SystemExit(75))

    monkeypatch.setattr(training, "_save", asked)
    with pytest.raises(SystemExit):
        quick(strategy=name, checkpoint=tmp_path / "s.pt")
    assert [place and place["steps"] for place in places] == [None, None, 1]
    monkeypatch.setattr(training, "_save", save)
    resumed = quick(strategy=name, checkpoint=tmp_path / "s.pt")
    assert torch.equal(straight.path, resumed.path) and straight.genotype == resumed.genotype
    assert all(torch.equal(v, resumed.block.state_dict()[n]) for n, v in straight.block.state_dict().items())


def test_single_level_architectures_stand_still_during_the_warm_up():
    for name in ("snas", "bayesnas"):
        result = quick(strategy=name, warmup=0.5)
        moved = [not torch.equal(result.path[0], scores) for scores in result.path]
        assert not any(moved[:len(moved) // 2]) and moved[-1]


def test_perturbation_keeps_what_hurts_most_when_removed(tmp_path):
    whole, again = (quick(select="perturb", epochs=2, checkpoint=tmp_path / "c.pt") for _ in range(2))  # the second only reads
    assert whole.genotype == again.genotype
    assert (tmp_path / "c.perturb.pt").exists() and whole.genotype.live()
    assert "skip" not in quick(select="perturb", epochs=1, max_skip=0).genotype.choices
    with pytest.raises(ArchrepairError, match="selection"):
        quick(select="best")


def test_perturbation_by_hand():
    from archrepair.nas.discretization import Removal
    from archrepair.repair.search import Relaxed

    strategy, supernet, *_ = started("darts")
    relaxed = Relaxed(supernet, strategy)
    worth = torch.rand(strategy.mask.shape, generator=torch.Generator().manual_seed(0)) - 0.3
    loss = lambda: -float((worth * relaxed.allowed)[:, 1:].masked_fill(~strategy.mask[:, 1:], 0.0).sum())
    choices = Removal(relaxed, loss, None, 0).result()
    for row, mask, choice in zip(worth, strategy.mask, choices):
        value = torch.where(mask, row, -1.0)
        value[CANDIDATES.index("none")] = 0.0
        assert choice == CANDIDATES[int(value.argmax())]
    assert bool((relaxed.allowed.sum(1) == 1).all())
