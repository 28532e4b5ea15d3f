"""Find the block of a deep network that is to blame, search a better architecture for it, and repair it."""

# Written by hand: everything else in this folder is exported from nbs/. Names load on first use, so that
# `import archrepair` costs milliseconds and torch is imported only by what needs it.
from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {  # module -> the names it gives to `archrepair`, from the ground floor up
    "core.errors": ("ArchrepairError", "NoFailures"),
    "core.names": ("parse_version",),
    "core.paths": ("home",),
    "core.tiers": ("TIERS", "Tier", "resolve_tier"),
    "corruptions.catalogue": ("corrupt", "list_corruptions"),
    "nas.genotype": ("Genotype",),
    "nas.reading": ("CannotRelax",),
    "nas.strategies": ("STRATEGIES", "SearchStrategy", "make_strategy"),
    "data.images": ("ImageSet", "Normalize", "holdout", "normalization"),
    "data.datasets": ("load_dataset",),
    "data.failures": ("load_failures",),
    "data.pattern": ("Pattern",),
    "data.scenario": ("RepairData", "Scenario", "build_scenario"),
    "networks.blocks": ("block_names", "split"),
    "networks.models": ("create_model", "group_units", "list_models"),
    "networks.weights": ("load_weights", "save_weights"),
    "training.cost": ("CostMeter",),
    "training.evaluation": ("Evaluation", "compare", "evaluate", "is_correct", "predict", "robust_accuracy"),
    "training.fit": ("Recipe", "train_original"),
    "training.statistics": ("Summary", "mcnemar", "spearman", "wilcoxon", "wilson"),
    "deploy.export": ("export_network",),
    "deploy.report": ("write_report",),
    "repair.archrepair": ("ArchRepair",),
    "repair.blockdata": ("BlockData", "prepare"),
    "repair.drift": ("Drift", "drift"),
    "repair.finetuning": ("Finetuned", "finetune"),
    "repair.localization": ("localize",),
    "repair.result": ("RepairResult", "load"),
    "repair.search": ("SearchRecipe", "SearchResult", "search"),
    "repair.verdict": ("Verdict",),
    "repair.votes": ("Localization",),
    "experiments.cells": ("Cell", "Record", "repair_into", "run", "scenario_of"),
    "experiments.checks": ("Check", "Diagnosis"),
    "experiments.comparison": ("compare_blocks", "compare_methods"),
    "experiments.diagnosis": ("diagnose",),
    "experiments.doctor": ("doctor",),
    "experiments.methods": ("METHODS",),
    "experiments.originals": ("original", "outputs_of"),
    "experiments.runs": ("Runs", "method_cell"),
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    "Import a public name from the module that defines it."
    if name not in _WHERE:
        raise AttributeError(f"module 'archrepair' has no attribute {name!r}")
    value = getattr(import_module(f"archrepair.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
