"Every method, strategy and recipe by name: what their settings may be is checked before anything runs."
import math
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest
import torch

from archrepair import ArchRepair, RepairData
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS
from archrepair.core.settings import Setting, settings_of
from archrepair.core.tiers import resolve_tier
from archrepair.corruptions.catalogue import corrupt
from archrepair.data.datasets import load_dataset
from archrepair.data.emulators import emulate
from archrepair.experiments.cells import Cell, method_of
from archrepair.experiments.methods import TrueCorruption, method_class
from archrepair.experiments.runs import method_cell
from archrepair.nas.strategies import STRATEGIES
from archrepair.repair.search import SearchRecipe
from archrepair.training.fit import Recipe


def wrong_values(setting: Setting) -> list[object]:
    "Values of other kinds, and outside of the range, for a setting of numbers, flags or names."
    plain = {get_args(member)[0] if get_origin(member) is Annotated else member for member in members_of(setting.kind)}
    numbers = [True, "fast", math.nan, -1e9, [1]]
    if int in plain:
        return [*numbers, 2.5]
    if float in plain:
        return numbers
    if bool in plain:
        return [1, "no", [True]]
    return [3, True, ["block"]] if str in plain and Sequence not in {get_origin(kind) for kind in plain} else []


def members_of(kind: object) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


OWNERS = {**{name: method_class(name) for name in METHODS}, **STRATEGIES, "SearchRecipe": SearchRecipe, "Recipe": Recipe, "Cell": Cell}


@pytest.mark.parametrize("name", OWNERS)
def test_every_setting_refuses_other_kinds_and_unknown_names_have_a_nearest(name):
    settings, given = settings_of(OWNERS[name]), {"epochs": 1} if name == "Recipe" else {}
    cases = [(setting, value) for setting in settings.values() for value in wrong_values(setting)]
    assert len(cases) >= 2 * len(settings)
    for setting, value in cases:
        with pytest.raises(ArchrepairError, match=rf"{setting.name} is|unknown") as error:
            OWNERS[name](**{**given, setting.name: value})
        assert "expected" in str(error.value) and "\n" not in str(error.value)
    longest = max(settings, key=len)
    with pytest.raises(ArchrepairError, match=f"unknown option of .*'{longest}x': did you mean '{longest}'. known: .*{longest}"):
        OWNERS[name](**given, **{f"{longest}x": 1})


@pytest.mark.parametrize(("options", "message"), [
    ({"max_skips": 2}, "unknown option of the search 'max_skips': did you mean 'max_skip'. known: batch_size, .*max_skip, .*edge_norm"),
    ({"max_skip": -1}, "max_skip is -1; expected a whole number from 0, or None"), ({"max_skip": True}, "max_skip is True"),
    ({"inherited_lr": "1e-3"}, "inherited_lr is '1e-3'; expected a number from 0"), ({"order": 5}, "order is 5; expected 1, 2 or 'fd'"),
    ({"edge_norm": "no"}, "edge_norm is 'no'; expected True or False"), ({"select": "argmin"}, "unknown selection 'argmin': did you mean"),
    ({"warmup": 1}, "warmup is 1; expected a number from 0 to below 1"),
    ("max_skip", "search_options is 'max_skip'; expected a mapping, or a list of values, each a list of 2 values"),
    ({"failure_ratio": 7}, "failure_ratio is 7; expected a number from 0 to 1, or None"),
])
def test_options_of_a_search_are_checked_when_they_are_given(options, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        ArchRepair(strategy="pc-darts", search_options=options)
    assert "\n" not in str(error.value)


def test_options_of_a_search_may_be_a_mapping_or_pairs():
    pairs = ArchRepair(strategy="pc-darts", search_options=[["max_skip", 2], ["order", 2]])._search_recipe()
    assert pairs == ArchRepair(strategy="pc-darts", search_options={"max_skip": 2, "order": 2})._search_recipe() and pairs.max_skip == 2
    assert pairs.strategy_options == {"order": 2}


@pytest.mark.parametrize(("text", "options"), [
    ("apricot:eta=1e-3;subset=.5", {"eta": 1e-3, "subset": 0.5}), ("birdnn:normalize=no", {"normalize": False}),
    ("birdnn:normalize=True", {"normalize": True}), ("arachne:search=de; layers=[fc]", {"search": "de", "layers": ["fc"]}),
    ("sensei:threshold=inf", {"threshold": math.inf}), ("sensei:max_confusions=null", {"max_confusions": None}),
])
def test_words_of_a_method_are_read_as_what_it_expects(text, options):
    assert dict(method_cell(text, Cell(tier="smoke")).options) == options


@pytest.mark.parametrize(("text", "message"), [
    ("apricot:eta=fast", "eta is 'fast'; expected a number from 0"),
    ("retrain:epochs=2.5", "epochs is 2.5; expected a whole number from 0"),
    ("retrain:epoch=2", "unknown option of retrain 'epoch': did you mean 'epochs'"), ("retrain:views=0", "views is 0"),
    ("surgical:variant=blok", "unknown variant of surgical fine-tuning 'blok': did you mean 'block'"),
])
def test_wrong_words_of_a_method_are_one_line(text, message):
    with pytest.raises(ArchrepairError, match=message):
        method_cell(text, Cell(tier="smoke"))


@pytest.mark.parametrize(("settings", "message"), [
    ({"failure_rate": 7}, "failure_rate is 7; expected a number from 0 to 1"), ({"failure_rate": "half"}, "failure_rate is 'half'"),
    ({"failure_share": 0.5}, "unknown option of RepairData.of 'failure_share': did you mean 'failure_rate'"),
    ({"val_fraction": 1}, "val_fraction is 1; expected a number from 0 to below 1"), ({"seed": -1}, "seed is -1"),
])
def test_settings_of_repair_data_come_before_the_data(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        RepairData.of(None, None, **settings)


def test_a_ceiling_learns_from_the_corruption_of_the_failures():
    cell = method_cell("archrepair:emulator=ceiling;block=layer1", Cell(dataset="digits:defocus_blur:3", tier="smoke"))
    emulator = method_of(cell, resolve_tier("smoke")).emulator
    images = load_dataset("digits", "test").batch(torch.arange(4))
    assert torch.equal(emulate(emulator, images, torch.Generator()), corrupt(images, "defocus_blur", 3))
    noise, draws = TrueCorruption("gaussian_noise", 3), [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    one, again, other = (emulate(noise, images, draw) for draw in draws)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, emulate(noise, images, draws[0]))
    assert dict(cell.options)["emulator"] == "ceiling"


def test_a_ceiling_needs_a_known_corruption():
    with pytest.raises(ArchrepairError, match="emulator=ceiling is for failures under a known corruption"):
        method_cell("archrepair:emulator=ceiling", Cell(dataset="digits", tier="smoke"))
