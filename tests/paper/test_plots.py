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


def test_all_figures_have_one_look():
    with plt.rc_context():
        plots.set_style(figure_dpi=80)
        assert not plt.rcParams["axes.spines.top"] and not plt.rcParams["axes.grid"] and not plt.rcParams["legend.frameon"]
        assert plt.rcParams["figure.dpi"] == 80


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
    figure = plots.plot_changes({"": pd.DataFrame({"clean": [-0.04], "fog": [-0.06]}, index=["sensei"])}, "Change", rows="method")
    assert {"+0.0", "-0.1", "SENSEI", "FOG"} <= set(text_of(figure).splitlines())


def test_panels_of_changes_share_a_scale_and_frame_what_was_repaired():
    points = pd.DataFrame({"clean": [0.4, -0.6], "fog": [1.2, 9.4]}, index=["clean", "fog"])
    figure = plots.plot_changes({"ArchRepair": points, "SENSEI": 10 * points, "none": points[:0]}, "Change")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == ["ArchRepair", "SENSEI"]
    assert len({ax.collections[0].get_clim() for ax in panels}) == 1
    assert [[patch.get_xy() for patch in ax.patches] for ax in panels] == 2 * [[(0, 0), (1, 1)]]


def test_no_changes_are_a_figure_too():
    assert "Change" in text_of(plots.plot_changes({"ArchRepair": pd.DataFrame()}, "Change"))


def test_gains_are_sorted_by_unseen_images_and_unchanged_methods_come_last():
    runs = pd.DataFrame([("MODE", 0, 0.0, 0.0, True), ("SENSEI", 0, 3.0, -2.0, False), ("ArchRepair", 0, 2.0, 0.5, False),
                         ("ArchRepair", 1, 1.0, -0.1, False)], columns=["method", "seed", "full", "held_out", "unchanged"])
    figure = plots.plot_gains(runs, "Gains", {"ArchRepair": 3.5})
    [ax] = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ArchRepair (n = 2)", "SENSEI (n = 1)", "MODE (n = 1)"]
    assert text_of(figure).splitlines().count("unchanged") == 1
    [cross] = [line for line in ax.lines if line.get_marker() == "x"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([3.5], [0])
    filled = [line for line in ax.lines if line.get_markersize() == 9 and line.get_markerfacecolor() == METHOD_COLORS["archrepair"]]
    assert [list(line.get_xdata()) for line in filled] == [[0.2]]


def test_blocks_and_ablations_count_their_seeds():
    runs = pd.DataFrame({"block": ["layer1", "layer1", "layer2"], "seed": [0, 1, 0], "full gain": 1.0, "held_out gain": 0.5})
    shares = pd.DataFrame({"layer1": [0.5, 0.4], "layer2": [0.5, 0.6]}, index=[10, 50])
    figure = plots.plot_blocks(runs, shares, {0: "layer2", 1: "layer1"})
    assert {"Gain of repairing each block (n = 1 to 2)", "Suspiciousness of each block (n = 2)"} <= set(text_of(figure).splitlines())
    rings = figure.axes[0].collections[-1].get_offsets()
    assert rings[:, 0].round(2).tolist() == [-0.18, 0.82] and set(rings[:, 1]) == {0.5}
    variants = pd.DataFrame({"variant": ["whole", "part"] * 2, "seed": [0, 0, 1, 1], "gain": np.arange(4.0)})
    assert "made up (n = 2)" in text_of(plots.plot_ablation(variants, "made up"))


def test_a_mixture_has_a_line_for_every_candidate():
    graph = extract(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), ones(2, 3, 8, 8))
    before = Genotype.original(graph)
    figure = plots.plot_architectures(before, {"after": before})
    mixture = figure.axes[1]
    assert len(figure.axes) == 3 and len(mixture.lines) == sum(len(edge.candidates) for edge in graph.edges)
