"""What tests of reports share."""
import pytest

from archrepair.core.html import tag
from support.finished import furnish


@pytest.fixture
def undrawn(monkeypatch):
    "Without figures, which take most of the time."
    for module in ("outcome", "provenance"):
        monkeypatch.setattr(f"archrepair.deploy.{module}.figure", lambda *a: tag("figure"))


@pytest.fixture
def folder(tmp_path):
    "A finished repair of one's own."
    return furnish(tmp_path) / "outputs" / "repair"
