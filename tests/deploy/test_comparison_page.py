"""Several finished repairs on one page."""
import copy
import json
import re

import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.deploy.comparison_page import best_of, groups_of, render_comparison_page, row_of, write_comparison_page
from support.finished import DATASET
from support.reports import Checked, make


def test_a_saved_result_needs_no_record(parts, tmp_path):
    result = make(parts)
    folder = result.save(tmp_path / "saved")
    row = row_of(folder)
    assert row["after"] == result.metrics["after"]["held_out"]["accuracy"] and row["model"] is None and row["name"] == "saved"
    assert "Repairs 1" in render_comparison_page([folder])
    result.metrics = {}
    row = row_of(result.save(tmp_path / "alone"))
    assert row["after"] is None and row["difference"] is None and Checked(render_comparison_page([tmp_path / "alone", folder]))


def test_several_repairs_on_one_page(folder, tmp_path):
    record, others = json.loads((folder / "record.json").read_text()), []
    for name, points, flips, dataset in (("<b>two</b>", 1.5, 0.5, DATASET), ("three", -2.0, 9.0, DATASET), ("four", 0.0, 1.0, "digits:fog:1")):
        other = copy.deepcopy(record)
        other["cell"]["dataset"] = dataset
        for key in ("accuracy", "low", "high"):
            other["metrics"]["after"]["held_out"][key] += points
        other["metrics"]["change"]["held_out"]["negative_flips"] = flips
        others.append(tmp_path / name.replace("/", "∕"))
        others[-1].mkdir()
        (others[-1] / "record.json").write_text(json.dumps(other))
    rows = [row_of(f) for f in (folder, *others)]
    assert [len(g) for g in groups_of(rows)] == [3, 1] and best_of(rows[3:]) == {}
    best = best_of(groups_of(rows)[0])
    assert best["after"] == rows[1]["after"] and best["negative_flips"] == 0.5 and best["difference"] == rows[1]["difference"] and "forwards" not in best
    path = write_comparison_page([folder, *others], tmp_path / "out" / "all.html")
    text = path.read_text("utf-8")
    page = Checked(text)
    assert "://" not in text and not page.all("script") and "<b>two<∕b>" in page.words and len(page.all("table")) == 2 == len(page.all("svg"))
    bold = re.findall(r"<td><b>(.*?)</b>", text)
    assert f"{rows[1]['after']:.2f} %" in bold and "0.50 %" in bold and f"{rows[2]['after']:.2f} %" not in bold
    assert f"{rows[1]['after_interval'][0]:.2f}–{rows[1]['after_interval'][1]:.2f}" in page.words
    with pytest.raises(ArchrepairError, match="holds no repair"):
        write_comparison_page([folder, tmp_path / "none"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
