"The decisions that all strategies share: choices from scores, and when to stop."
import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.strategy import SearchStrategy
from support.relaxations import case

SKIP, SEP, POOL = (CANDIDATES.index(name) for name in ("skip", "sep_conv", "max_pool"))


class Preferences(SearchStrategy):
    "Its scores are its parameters."

    def init_arch(self, graph, generator):
        return nn.ParameterDict({"scores": nn.Parameter(torch.rand(len(graph.edges), len(CANDIDATES), generator=generator))})

    def make_optimizer(self):
        return torch.optim.SGD(self.arch.parameters(), 0.0)

    def scores(self):
        return self.arch["scores"].detach() * self.mask

    def prefer(self, candidate, score=2.0):
        "Score one candidate on every edge; the others stay below 1."
        self.arch["scores"].data.clamp_(max=1.0)[:, candidate] = score


@pytest.fixture
def strategy():
    preferences = Preferences()
    preferences.start(case("resnet18", "layer2")[2], steps=10, generator=torch.Generator().manual_seed(0))
    return preferences


def test_argmax_takes_the_best_candidate_of_every_edge(strategy):
    assert strategy.decide() == tuple(CANDIDATES[int(row.argmax())] for row in strategy.scores())
    strategy.prefer(0)
    assert set(strategy.decide()) == {"none"}


def test_top2_keeps_two_edges_into_each_node_and_no_none(strategy):
    strategy.prefer(0)
    choices = strategy.decide("top2")
    for node in range(1, len(strategy.graph.nodes)):
        incoming = [i for i, _ in strategy.graph.incoming(node)]
        live = [i for i in incoming if choices[i] != "none"]
        strength = strategy.scores()[incoming, 1:].amax(1)
        assert set(live) == {incoming[int(i)] for i in strength.topk(min(2, len(incoming))).indices}


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_strongest_skips_remain(strategy, limit):
    strategy.arch["scores"].data[:, SKIP] = torch.linspace(2.0, 3.0, len(strategy.mask))
    choices = strategy.decide(max_skip=limit)
    assert [i for i, choice in enumerate(choices) if choice == "skip"] == list(range(len(choices) - limit, len(choices)))


def test_an_unknown_selection(strategy):
    with pytest.raises(ArchrepairError, match="selection"):
        strategy.decide("best")


def test_choices_that_do_not_change_end_the_search(strategy):
    strategy.prefer(SEP)
    assert [bool(strategy.on_epoch_end()) for _ in range(strategy.patience + 1)] == [False] * strategy.patience + [True]
    assert strategy.on_epoch_end() == "the choices have not changed for 5 epochs"


def test_a_collapse_ends_the_search_where_it_was_healthy(strategy):
    strategy.prefer(SEP)
    assert strategy.on_epoch_end() == ""
    healthy = strategy.arch["scores"].detach().clone()
    strategy.prefer(POOL, 3.0)
    assert strategy.on_epoch_end().startswith("skip collapse, operations without weights won 10 of 10 edges")
    assert torch.equal(strategy.arch["scores"], healthy)


def test_the_state_is_restored(strategy):
    strategy.prefer(SEP)
    strategy.on_epoch_end()
    state = strategy.state_dict()
    other = Preferences()
    other.start(strategy.graph, steps=10, generator=torch.Generator().manual_seed(1))
    other.load_state_dict(state)
    assert other.decide() == strategy.decide() and other.decisions == strategy.decisions
    assert torch.equal(other.healthy["scores"], strategy.healthy["scores"])
