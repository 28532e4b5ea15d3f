"Strategies and the search: what moves, what cannot, and that the same seed gives the same block."
import copy
from dataclasses import replace

import pytest
import torch

from archrepair import search as _search  # noqa: F401  (the module must import by itself)
from archrepair.core.errors import ArchrepairError
from archrepair.data.pattern import Pattern
from archrepair.nas.genotype import Genotype
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.reading import CannotRelax
from archrepair.repair.blockdata import prepare
from archrepair.repair.gatedata import Ordinary
from archrepair.repair.search import Relaxed, search
from support.searches import quick, setting, started

SEP, SKIP = CANDIDATES.index("sep_conv"), CANDIDATES.index("skip")


def test_pc_darts_in_one_part_without_edge_weights_is_darts():
    a, _, one, first = started("darts")
    b, _, two, second = started("pc-darts", channel_k=1, edge_norm=False)
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one(x), two(x))
    a.arch_step(first), b.arch_step(second)
    assert torch.equal(a.arch["alpha"], b.arch["alpha"]) and not torch.equal(a.arch["alpha"], a.initial["alpha"])
    c, _, _, third = started("pc-darts", channel_k=1)
    c.arch_step(third)
    assert "beta" in c.arch and float(c.arch["beta"].grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["darts", "pc-darts"])
def test_coefficients_start_at_the_network_that_came_in(name):
    strategy, _, _, _ = started(name)
    c, inherited = strategy.coefficients(1, True), strategy.mask[:, -1]
    assert bool((c[inherited, -1] == 1).all()) and bool((c[~strategy.mask] == 0).all())
    assert torch.allclose(strategy.scores().sum(1), torch.ones(len(c)))
    assert strategy.scores()[inherited, -1].max() < 0.32  # leads, and can be beaten
    assert strategy.decide() == Genotype.original(strategy.graph).choices


def test_dead_start_and_warm_up():
    strategy, supernet, network, context = started("pc-darts")
    strategy.arch_step(context)
    for row, mask, edge in zip(strategy.arch["alpha"].grad, strategy.mask, strategy.graph.edges):
        others = row[:-1] if edge.inherited is not None else row[1:-1]
        assert torch.allclose(others[mask[:-1] if edge.inherited is not None else mask[1:-1]], others[1].expand(1), rtol=1e-5, atol=1e-9)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        context.loss(None).backward()
        optimizer.step()
    strategy.arch_step(context)
    rows, inherited = strategy.arch["alpha"].grad[:, 1:-1], strategy.mask[:, -1]
    spread = rows.std(1) / rows.abs().mean(1)
    assert float(spread[~inherited].min()) > 0.05 and float(spread[inherited].min()) > 1e-5


def test_an_architecture_step_changes_nothing_but_the_architecture():
    strategy, supernet, network, context = started("pc-darts")
    before = copy.deepcopy(network.state_dict())
    strategy.arch_step(context)
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in before.items())
    assert all(p.grad is None for p in network.parameters()) and not any(p.requires_grad for p in strategy.arch.values())


@pytest.mark.parametrize("arch_lr, wins", [(6e-4, "original"), (None, "sep_conv")])
def test_reach(arch_lr, wins):
    "Under a gradient that always favors one candidate, the published rate cannot leave the start and the reach rule can."
    strategy, *_ = started("darts", steps=150, arch_lr=arch_lr)
    for _ in range(150):
        strategy.arch["alpha"].grad = torch.zeros_like(strategy.arch["alpha"])
        strategy.arch["alpha"].grad[:, SEP] = -1.0
        strategy.optimizer.step()
    assert strategy.decide()[0] == wins


def test_skip_collapse_stops_and_can_be_limited():
    strategy, *_ = started("darts")
    assert strategy.on_epoch_end() == ""
    before = strategy.arch["alpha"].clone()
    strategy.arch["alpha"].data[:6, SKIP] = torch.linspace(5, 6, 6)
    collapsed = strategy.arch["alpha"].clone()
    assert "skip collapse" in strategy.on_epoch_end() and torch.equal(strategy.arch["alpha"], before)
    strategy.arch["alpha"].data.copy_(collapsed)
    assert strategy.decide().count("skip") == 6 and strategy.decide(max_skip=2).count("skip") == 2
    assert [i for i, c in enumerate(strategy.decide(max_skip=2)) if c == "skip"] == [4, 5]


def test_stops_when_the_choices_are_stable():
    strategy, *_ = started("darts")
    assert [bool(strategy.on_epoch_end()) for _ in range(6)] == [False] * 5 + [True]


def test_top_two_keeps_two_edges_a_node():
    strategy, *_ = started("pc-darts")
    strategy.arch["alpha"].data += torch.rand(strategy.arch["alpha"].shape, generator=torch.Generator().manual_seed(0))
    choices = strategy.decide("top2")
    for node in range(1, 5):
        assert sum(choices[i] != "none" for i, _ in strategy.graph.incoming(node)) == min(node, 2)
    with pytest.raises(ArchrepairError, match="selection"):
        strategy.decide("best")


@pytest.mark.parametrize("name, strategy", [
    ("resnet18", "pc-darts"), ("resnet18", "darts"), ("resnet50", "pc-darts"), ("resnet18", "snas"), ("resnet18", "bayesnas")])
def test_search_end_to_end(name, strategy):
    model, _, prepared = setting(name)
    before, inside = copy.deepcopy(model.state_dict()), copy.deepcopy(prepared.cut.model.state_dict())
    result = quick(name, strategy=strategy)
    for network, state in ((model, before), (prepared.cut.model, inside)):
        assert all(torch.equal(v, network.state_dict()[n]) for n, v in state.items())
    assert not result.block.training and all(p.requires_grad for p in result.block.parameters())
    assert strategy == "bayesnas" or all(abs(sum(p.values()) - 1) < 1e-3 for p in result.arch.values())
    assert len(result.history) == 3 or "stopped after" in result.warnings[0]
    assert result.path.shape[1:] == (len(result.arch), len(CANDIDATES)) and not torch.equal(result.path[0], result.path[-1])
    assert bool((result.path[0] == result.path[1]).all())  # warm-up: the weights learn alone
    x = prepared.entering(4)
    again = Genotype.from_json(result.genotype.to_json()).build(prepared.cut.block)
    again.load_state_dict(result.block.state_dict())
    assert torch.equal(again(x), result.block(x)) and not torch.equal(result.block(x), prepared.cut.block(x))


def test_same_seed_same_block_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    straight, twice, other = quick(), quick(), quick(seed=1)
    same = lambda a, b: a.genotype == b.genotype and all(torch.equal(v, b.block.state_dict()[n]) for n, v in a.block.state_dict().items())
    assert same(straight, twice) and not torch.equal(straight.path[-1], other.path[-1])

    from archrepair.training import fit as training

    save, saved = training._save, []

    def killed(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "search.pt"
    monkeypatch.setattr(training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        quick(checkpoint=path)
    monkeypatch.setattr(training, "_save", save)
    resumed = quick(checkpoint=path)
    assert same(straight, resumed) and torch.equal(straight.path, resumed.path)
    with pytest.raises(ArchrepairError, match="added_lr"):
        quick(checkpoint=path, added_lr=0.5)


def test_architecture_may_learn_from_emulated_validation_images(monkeypatch):
    "Where the emulator is faithful; else it learns from its half as ever, and the result says so."
    plain, unfaithful = quick(), quick(arch_data="emulated")
    assert torch.equal(plain.path, unfaithful.path) and any("no emulator is faithful" in warning for warning in unfaithful.warnings)
    monkeypatch.setattr(Pattern, "faithful", True)
    emulated = quick(arch_data="emulated")
    validation = len(Ordinary.of(setting()[1]).val)
    assert any(f"from {validation:,} emulated validation images" in warning for warning in emulated.warnings)
    assert torch.equal(plain.path[0], emulated.path[0]) and not torch.equal(plain.path[-1], emulated.path[-1])
    with pytest.raises(ArchrepairError, match="arch_data=emulated is for strategies of two levels, such as pc-darts; snas has one"):
        quick(strategy="snas", arch_data="emulated")


def test_half_precision_and_cost():
    model, data, _ = setting()
    prepared = prepare(model, "layer3", data, precision="bf16")
    spent = prepared.meter.backwards
    result = search(model, "layer3", prepared=prepared, epochs=2, batch_size=32)
    assert all(bool(torch.isfinite(p).all()) for p in result.block.parameters())
    assert next(result.block.parameters()).dtype == torch.float32 and prepared.meter.backwards > spent


def test_a_rate_that_cannot_move_is_reported():
    assert any("arch_lr=None" in w for w in quick(epochs=1, strategy_options={"arch_lr": 1e-5}).warnings)
    assert not any("arch_lr=None" in w for w in quick(epochs=1).warnings)


def test_mistakes_are_one_line():
    for options, message in (({"strategy": "genetic"}, "unknown strategy"), ({"warmup": 1.0}, "warmup"), ({"level": "x"}, "level")):
        with pytest.raises(ArchrepairError, match=message):
            quick(**options)


@pytest.fixture(scope="module")
def negatives():
    "A network that fails on negatives, which a gate can tell from other images."
    model, data, _ = setting()
    negative = lambda images: replace(images, images=255 - images.batch(torch.arange(len(images))))
    return prepare(model, "layer3", replace(data, failures=negative(data.failures), val_failures=negative(data.val_failures)))


@pytest.mark.parametrize("strategy, options", [("pc-darts", {}), ("darts", {"order": 2}), ("darts", {"order": "fd"}), ("snas", {}),
                                               ("bayesnas", {})])
@torch.no_grad()
def test_conditional_candidates_leave_the_block_to_all_images_on_which_the_gate_does_not_fire(negatives, strategy, options):
    with torch.enable_grad():
        result = search(negatives, strategy=strategy, strategy_options=options, candidates="conditional", epochs=2, batch_size=32)
    parts = [negatives.parts[name].batch(torch.arange(24)) for name in ("train", "failures")]
    x, original = torch.cat(parts), negatives.split.block
    fires = result.block.gate(x)[:, 0, 0, 0]
    assert fires[24:].float().mean() > 0.8 and fires[:24].float().mean() < 0.2
    assert torch.equal(result.block.eval()(x)[~fires], original(x)[~fires]) and result.genotype.gated
    relaxed = Relaxed(result.supernet, result.strategy, result.block.gate).eval()
    assert torch.equal(relaxed(x)[~fires], original(x)[~fires])
    assert (result.path[0] != result.path[-1]).any() and result.touch.n == len(negatives.parts["val"])


def test_conditional_candidates_need_a_gate_that_can_tell():
    with pytest.raises(CannotRelax, match="no gate on what enters layer3 tells failures from other images"):
        quick(candidates="conditional")
    model, data, _ = setting()
    with pytest.raises(CannotRelax, match="9 failures are too few"):
        search(model, "layer3", replace(data, failures=data.failures.select(torch.arange(9))), candidates="conditional", epochs=1)
