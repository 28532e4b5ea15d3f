"""Every entry names what there is, and whatever there is has an entry."""
import importlib
import pkgutil
import subprocess
import sys

import pytest

import archrepair.baselines
import archrepair.nas
from archrepair.baselines.domains import DomainBIRDNN
from archrepair.core import registry
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS, Entry, Registry
from archrepair.corruptions.catalogue import FUNCTIONS, PARAMETERS
from archrepair.data.images import STATISTICS
from archrepair.experiments.methods import method_class
from archrepair.nas.strategies import STRATEGIES
from archrepair.nas.strategy import SearchStrategy
from archrepair.networks.models import MODELS

ALL = [registry.METHODS, registry.STRATEGIES, registry.CORRUPTIONS, registry.EMULATORS, registry.MODELS, registry.DATASETS]


def classes_in(package) -> set[type]:
    "The public classes that the modules right in a package define."
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {thing for module in modules for thing in vars(module).values()
            if isinstance(thing, type) and thing.__module__ == module.__name__ and not thing.__name__.startswith("_")}


# --- entries and implementations

@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_called_by_its_name(name):
    fields = method_class(name).__dataclass_fields__
    assert fields["name"].default == name
    assert callable(method_class(name).repair)


def test_every_method_has_an_entry():
    others = {DomainBIRDNN}  # repairs a property of a region of inputs, not failures
    methods = {thing for thing in classes_in(archrepair.baselines) if hasattr(thing, "repair")} - others
    assert methods == {method_class(name) for name in METHODS if name != "archrepair"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_called_by_its_name(name):
    assert STRATEGIES[name].name == name


def test_every_strategy_has_an_entry():
    strategies = {thing for thing in classes_in(archrepair.nas) if issubclass(thing, SearchStrategy) and thing.name}
    assert strategies == set(STRATEGIES.values())


def test_every_corruption_has_a_function_and_constants():
    assert FUNCTIONS.keys() == PARAMETERS.keys() == registry.CORRUPTIONS.keys()


def test_every_model_has_a_builder_in_the_same_order():
    assert list(MODELS) == list(registry.MODELS)


def test_statistics_belong_to_datasets():
    assert STATISTICS.keys() <= registry.DATASETS.keys()


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.kind)
def test_descriptions_are_one_line_and_labels_are_different(table):
    descriptions, labels = [entry.description for entry in table.values()], list(table.labels().values())
    assert all(text and "\n" not in text and len(text) < 110 for text in descriptions) and len(set(descriptions)) == len(table)
    assert len(set(labels)) == len(labels)


def test_roles_and_kinds_are_those_there_are():
    assert {method.role for method in registry.METHODS.values()} == {"ours", "paper", "related", "control"}
    assert {corruption.kind for corruption in registry.CORRUPTIONS.values()} == {"noise", "blur", "weather", "digital"}


# --- looking up

@pytest.mark.parametrize("table", ALL, ids=lambda table: table.kind)
def test_an_unknown_name_is_answered_with_the_nearest(table):
    name = next(iter(table))
    with pytest.raises(ArchrepairError, match=f"unknown {table.kind} '{name}_': did you mean '{name}'"):
        table[f"{name}_"]
    assert f"{name}_" not in table and table.get(f"{name}_") is None


def test_unknown_methods_and_strategies_are_named_where_they_are_asked_for():
    with pytest.raises(ArchrepairError, match="unknown method 'arachnid': did you mean 'arachne'"):
        method_class("arachnid")


def test_an_entry_imports_its_target_when_asked():
    assert Entry("a text", "json:dumps").load()([1]) == "[1]"
    with pytest.raises(ArchrepairError, match="expected an entry with a target"):
        Entry("a text").load()
    with pytest.raises(AttributeError):
        Entry("a text", "json:dump_all").load()


def test_labels_leave_out_entries_without_one():
    assert Registry("thing", {"a": Entry("one", label="A"), "b": Entry("two")}).labels() == {"a": "A"}


def test_nothing_heavy_is_imported_for_names():
    program = ("import sys, archrepair.core.registry, archrepair.experiments.methods, archrepair.cli.listing\n"
               "print(sorted({'torch', 'torchvision', 'numpy', 'pandas'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
