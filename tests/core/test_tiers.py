"""Tiers by name, and by the machine."""
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.core.tiers import TIERS, Tier, image_passes, resolve_tier


def test_auto_is_smoke_in_tests_and_depends_on_the_machine_otherwise(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert resolve_tier().name == "smoke"
    monkeypatch.delenv("IN_TEST")
    for gpu, name in ((True, "paper"), (False, "lite")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert resolve_tier("auto").name == name


def test_tiers_by_name(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # turns only `auto` into smoke
    assert resolve_tier("paper") is TIERS["paper"] and resolve_tier(TIERS["lite"]) is TIERS["lite"]
    assert all(isinstance(t, Tier) and t.name == name for name, t in TIERS.items())
    assert TIERS["paper"].width == 1 and TIERS["paper"].stem_stride == 1 and TIERS["paper"].failures == 1000 and TIERS["paper"].seeds == 5
    with pytest.raises(ArchrepairError, match="did you mean 'smoke'"):
        resolve_tier("smoker")


def test_passes_follow_the_tier():
    smoke, lite = TIERS["smoke"], TIERS["lite"]
    assert image_passes("archrepair", smoke, 1080) == pytest.approx(6.0 * (1080 + 100) * 5)
    assert image_passes("archrepair", lite, 45_000) == image_passes("archrepair", lite, 20_000)  # the tier takes no more
    assert image_passes("archrepair", lite, 100, 30) == pytest.approx(6.0 * (100 + 30 * 8) * 9)
    assert image_passes("archrepair", lite, 100, 5000) > image_passes("archrepair", lite, 100)  # as many as asked for
    assert image_passes("unheard of", smoke, 100, 0) == 4.0 * 100 * 5
