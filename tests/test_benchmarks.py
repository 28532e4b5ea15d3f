"""The table of ratios: how they are measured, what a row says, and where it is written."""
import importlib.util
import json
import sys

import pytest

from support import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    "The modules `measure` and `run` of the folder of benchmarks."
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = []
    for name in ("measure", "run"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


def test_sides_take_turns_and_the_first_round_does_not_count(scripts):
    measure, calls = scripts[0], []
    seconds = measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and [len(times) for times in seconds.values()] == [3, 3]
    assert measure.quotients([6.0, 8.0], [2.0, 4.0]) == [3.0, 2.0]


def test_a_row_says_whether_the_goal_is_reached(scripts):
    measure, run = scripts
    faster = measure.Ratio.of("repair", "an epoch", "the plain loop", [10.0, 9.0, 14.0], limit=4.37, goal=12.0)
    assert (faster.median, faster.low, faster.high) == (10.0, 9.0, 14.0)
    assert run.row(faster.as_dict()) == "| an epoch | the plain loop | 10.00 times faster | 9.00 – 14.00 | 4.37 | 12 | not yet |"
    cost = measure.Ratio.of("search", "a step", "a step of fine-tuning", [1.9, 1.8, 2.1], unit="fine-tuning steps", goal=2.0)
    assert run.row(cost.as_dict()).endswith("| 1.90 fine-tuning steps | 1.80 – 2.10 |  | 2 | yes |")
    assert run.row(measure.Ratio("x", "a", "b", 3.0, 3.0, 3.0).as_dict()) == "| a | b | 3.00 times faster |  |  |  |  |"


def test_lines_of_cases_that_are_not_run_stay(scripts, monkeypatch, tmp_path, capsys):
    measure, run = scripts
    lines = {case: [measure.Ratio.of(case, f"what {case} does", "plain", [2.0])] for case in run.CASES}
    monkeypatch.setattr(run, "lines_of", lambda case, rounds, full: iter(lines[case]))
    page = tmp_path / "page.md"
    page.write_text(f"# Benchmarks\n\n{run.BEGIN}\nold\n{run.END}\n\nrest\n", encoding="utf-8")
    monkeypatch.setattr(run, "PAGE", page)
    for arguments in (["search", "repair"], ["corruptions", "repair", "--page"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--out", str(tmp_path)])
        run.main()
    (path,) = tmp_path.glob("*.json")
    assert [line["script"] for line in json.loads(path.read_text(encoding="utf-8"))["lines"]] == ["repair", "search", "corruptions"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n") and text.endswith("\n\nrest\n") and "old" not in text and text.count("| what ") == 4
    assert capsys.readouterr().out.count("\n") == 4


def test_a_slope_is_the_power_with_which_a_cost_grows(scripts):
    growth = importlib.import_module("growth")
    assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    points = [{"factor": "images", "value": n, "step": step, "seconds": 0.1 * n, "MB": 30.0} for n in (1000, 2000) for step in growth.STEPS]
    del points[-1]  # a search of many images is left out
    assert growth.line_of(points, "images", "search", "MB") == ([1000], [30.0])
    assert growth.line_of(points, "images", "localize", "seconds") == ([1000, 2000], [100.0, 200.0])
    points.append({"factor": "images", "value": 2000, "step": "search", "seconds": 400.0, "MB": 60.0})
    assert growth.table(points).splitlines()[2:] == ["| images | 1000 – 2000 | 1.00 / 0.00 | 1.00 / 0.00 | 1.00 / 0.00 | 2.00 / 1.00 |"]


def test_an_unknown_case_is_wrong_usage(scripts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "speed"])
    with pytest.raises(SystemExit) as ended:
        scripts[1].main()
    assert ended.value.code == 2


def test_the_page_has_room_for_the_table(scripts):
    run = scripts[1]
    text = run.PAGE.read_text(encoding="utf-8")
    assert text.count(run.BEGIN) == text.count(run.END) == 1
    assert all(f"| `{case}` |" in text and (FOLDER / f"bench_{case}.py").is_file() for case in run.CASES)
