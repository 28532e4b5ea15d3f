"""Which runs each table and figure needs."""
from dataclasses import replace

import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.paper.exhibits import EXHIBITS, FEW_CORRUPTIONS, SMOKE_DATASETS, Settings, everywhere, requirements
from archrepair.paper.plan import source_of
from archrepair.paper.published import DISPLAY_NAMES, published
from support.exhibits import SMOKE


def test_every_table_and_figure_of_the_paper_is_there():
    assert list(EXHIBITS) == ["table1", "fig1", "fig2", "fig3", "table4", "table5", "table6", "fig4", "fig5", "table7", "fig6", "fig7",
                              "table8", "table9", "table10"]
    assert {f"table{t}" for t in published()["table"].unique()} == {name for name in EXHIBITS if name.startswith("table")}
    for exhibit in EXHIBITS.values():
        assert source_of(exhibit.notebook).is_file()


def test_the_paper_tier_has_the_papers_sizes():
    full = Settings.of(tier="paper", models=",".join(list(DISPLAY_NAMES["model"])[:6]))  # the paper's come first
    assert len(full.seeds) == 5 and len(full.corruptions) == 15 and full.dataset == "cifar10"
    assert len(requirements(["table5"], full)) == 6 * 7 * 5  # networks, methods, runs
    assert len(requirements(["table7"], replace(full, models=("resnet18",)))) == 5 * 16 * 5  # methods, clean and corruptions, runs
    assert len(requirements(["table1"], replace(full, models=full.models[1:4]))) == 3 * 4 * 5
    assert len(requirements(["table9"], replace(full, models=("resnet50",)))) == 4 * 5
    assert all(len(requirement.versions) == 16 for requirement in requirements(["table8"], full))


def test_a_cell_is_required_once_with_all_its_versions():
    both = requirements(["table5", "fig4"], SMOKE)
    assert len(both) == len({requirement.cell for requirement in both}) == 2
    assert all(requirement.versions == everywhere(SMOKE) for requirement in both)
    assert all(requirement.versions == () for requirement in requirements(["table5"], SMOKE))
    with pytest.raises(ArchrepairError, match="unknown table or figure 'table2': did you mean"):
        requirements(["table2"], SMOKE)


@pytest.mark.parametrize(("changes", "message"), [
    ({"corruption": "fgo"}, "unknown corruption 'fgo': did you mean 'fog'"), ({"protocol": "dirty"}, "unknown protocol"),
    ({"tier": "big"}, "unknown tier"), ({"seeds": -1}, "seeds is -1"),
    ({"severity": 6}, "severity is 6; expected a whole number from 1 to 5"), ({"models": ","}, "at least one")])
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ArchrepairError, match=message) as caught:
        Settings.of(**{"tier": "smoke", **changes})
    assert "\n" not in str(caught.value)


def test_settings_from_text():
    settings = Settings.of(tier="smoke", models=" resnet18, vgg16,resnet18", corruption="all", seed=3, seeds=2)
    assert settings.models == ("resnet18", "vgg16") and settings.seeds == (3, 4) and len(settings.corruptions) == 15
    assert settings.stem == "resnet18+vgg16-digits~fog~3-clean"
    assert settings.version("snow") == "digits:snow:3" and settings.version("clean") == "digits:fog:3"
    usual = Settings.of(tier="smoke")
    assert usual.corruptions == FEW_CORRUPTIONS["smoke"] and usual.dataset == SMOKE_DATASETS[0]


def test_figures_5_and_7_show_the_second_dataset():
    shown = {value: [name for name, exhibit in EXHIBITS.items() if exhibit.uses_second_dataset is value] for value in (False, True)}
    assert shown == {False: ["fig4", "fig6"], True: ["fig5", "fig7"]}
    for tier, first, second in (("smoke", *SMOKE_DATASETS), ("lite", "cifar10", "tiny-imagenet")):
        assert not Settings.of(tier=tier, dataset=first).uses_second_dataset
        assert Settings.of(tier=tier, dataset=second).uses_second_dataset
