"""Votes: who is first, and what ties do."""
import pandas as pd

from archrepair.repair.votes import count_blocks, most_suspicious


def neurons_of(s_hat, s=None, block=None):
    return pd.DataFrame({"s_hat": s_hat, "s": s_hat if s is None else s, "block": block or ["a"] * len(s_hat)})


def test_order_is_by_s_hat_then_s_then_position():
    table = neurons_of([0.5, 0.7, 0.5, 0.5], [0.5, 0.9, 0.6, 0.5])
    assert most_suspicious(table, 4).index.tolist() == [1, 2, 0, 3]
    assert most_suspicious(table, 2).index.tolist() == [1, 2]
    assert most_suspicious(table, 1, by="s").index.tolist() == [1]


def test_ties_are_included_on_request():
    table = neurons_of([0.9, 0.5, 0.5, 0.5, 0.1])
    assert len(most_suspicious(table, 2)) == 2 and len(most_suspicious(table, 2, ties="include")) == 4
    assert len(most_suspicious(table, 99, ties="include")) == 5


def test_only_neurons_inside_a_block_vote_for_it():
    table = neurons_of([0.9, 0.8, 0.7, 0.6], block=["b", "", "b", "a"])
    assert count_blocks(most_suspicious(table, 3), ["a", "b"]).to_dict() == {"a": 0, "b": 2}
