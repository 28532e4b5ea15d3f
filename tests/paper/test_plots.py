"""A method looks the same in every figure, and a figure says of how many seeds it is."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from torch import nn, ones

from archrepair.core.registry import METHODS
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import extract
from archrepair.paper import plots
from archrepair.paper.plots import METHOD_COLORS, METHOD_MARKERS, method_palette


def text_of(figure: plt.Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(artist.get_text() for artist in figure.findobj(plt.Text))


def scores(methods: list[str], seeds: int) -> pd.DataFrame:
    return pd.DataFrame([{"method": method, "seed": seed, "corruption": corruption, "accuracy": 70.0 + i + seed}
                         for i, method in enumerate(methods) for seed in range(seeds) for corruption in ("Clean", "FOG")])


def test_every_method_has_a_color_and_a_marker_of_its_own():
    names = ["original", *METHODS]
    assert set(names) <= set(METHOD_COLORS) == set(METHOD_MARKERS)
    assert len(set(METHOD_COLORS.values())) == len(set(METHOD_MARKERS.values())) == len(METHOD_COLORS)


def test_a_method_has_one_color_whichever_others_are_shown():
    few = ["original", "sensei", "archrepair"]
    assert method_palette(few).items() <= method_palette(["mode", "apricot", *few]).items()
    assert method_palette(["arachne:search=de"])["arachne:search=de"] == METHOD_COLORS["arachne"]
    assert method_palette(["my_own"])["my_own"] not in METHOD_COLORS.values()


@pytest.mark.parametrize("seeds", [1, 2])
def test_accuracies_are_dots_around_the_original(seeds):
    methods = ["original", "sensei", "archrepair"]
    figure = plots.plot_accuracies({"repaired on fog": scores(methods, seeds)}, methods, panel_height=2, framed={"repaired on fog": "FOG"})
    [ax] = figure.axes
    assert len(ax.containers) == 2 and ax.patches[0].get_fill() != ax.patches[-1].get_fill()  # a band and a frame, no bars
    assert f"(n = {seeds})" in text_of(figure)
    dots = {container.lines[0].get_color(): container.lines[0].get_ydata()[0] for container in ax.containers}
    assert dots == {METHOD_COLORS["sensei"]: 71 + (seeds - 1) / 2, METHOD_COLORS["archrepair"]: 72 + (seeds - 1) / 2}


def test_parts_of_a_gain_name_those_that_changed_nothing():
    parts = pd.DataFrame({"a": [1.0, 0], "b": [-1.0, 0], "c": [0.5, 0], "n": [3, 1], "unchanged": [False, True]}, index=["Apricot", "MODE"])
    text = text_of(plots.plot_parts_of_gain(parts, "Parts"))
    assert "Apricot (n = 3)" in text and "MODE (n = 1)" in text and text.count("unchanged") == 1


def test_changes_have_no_negative_zero():
    figure = plots.plot_changes(pd.DataFrame({"clean": [-0.04], "fog": [-0.06]}, index=["sensei"]), "Change", rows="method")
    assert {"+0.0", "-0.1", "SENSEI", "FOG"} <= set(text_of(figure).splitlines())


def test_blocks_and_ablations_count_their_seeds():
    runs = pd.DataFrame({"block": ["layer1", "layer1", "layer2"], "seed": [0, 1, 0], "full gain": 1.0, "held_out gain": 0.5})
    shares = pd.DataFrame({"layer1": [0.5, 0.4], "layer2": [0.5, 0.6]}, index=[10, 50])
    assert "(n = 1 to 2)" in text_of(plots.plot_blocks(runs, shares))
    variants = pd.DataFrame({"variant": ["whole", "part"] * 2, "seed": [0, 0, 1, 1], "gain": np.arange(4.0)})
    assert "made up (n = 2)" in text_of(plots.plot_ablation(variants, "made up"))


def test_a_mixture_has_a_line_for_every_candidate():
    graph = extract(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), ones(2, 3, 8, 8))
    before = Genotype.original(graph)
    figure = plots.plot_architectures(before, {"after": before})
    mixture = figure.axes[1]
    assert len(figure.axes) == 3 and len(mixture.lines) == sum(len(edge.candidates) for edge in graph.edges)
