"""Find the block of a deep network that is to blame, search a better architecture for it, and repair it."""

# Written by hand: everything else in this folder is exported from nbs/. Names load on first use, so that
# `import archrepair` costs milliseconds and torch is imported only by what needs it.
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_WHERE = {
    "ArchrepairError": "errors",
    "TIERS": "tiers", "Tier": "tiers", "resolve_tier": "tiers",
    "ImageSet": "data", "Normalize": "data", "load_dataset": "data",
    "load_failures": "failures",
    "RepairData": "scenario", "build_scenario": "scenario",
    "corrupt": "corruptions", "list_corruptions": "corruptions",
    "create_model": "models", "group_units": "models", "list_models": "models", "block_names": "blocks",
    "split": "blocks",
    "train_original": "training",
    "evaluate": "evaluation", "is_correct": "evaluation", "predict": "evaluation",
    "localize": "localization",
    "search": "search",
    "export_network": "exporting",
    "Genotype": "genotype",
    "finetune": "finetuning",
    "ArchRepair": "repair", "RepairResult": "repair", "load": "repair",
    "Cell": "experiments", "METHODS": "experiments", "original": "experiments", "run": "experiments",
    "STRATEGIES": "strategies", "SearchStrategy": "strategies",
    "compare_blocks": "comparison", "compare_methods": "comparison",
    "make_strategy": "strategies", "mcnemar": "evaluation", "robust_accuracy": "evaluation", "wilcoxon": "evaluation",
}

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


class _Package(ModuleType):
    "Importing a submodule puts it into its package under its name; where a public name is the same, the public name stays."

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
