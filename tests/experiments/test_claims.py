"""Every number in README's table is a claim, every claim follows from the stored records, and a wrong one is noticed."""
import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError
from archrepair.deploy.gate_view import GAIN_BY_FAILURES
from archrepair.experiments.cells import Record
from archrepair.experiments.claims import Claim, measure_again, read_claims

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = read_claims(ROOT / "data" / "claims.toml")
COLUMNS = {"change": "", "clean": "-clean", "fine-tuning": "-fine-tuning"}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_follows_from_the_records(name):
    claim = CLAIMS[name]
    outcome = claim.check(claim.measure(ROOT / "outputs"))
    assert outcome.holds, str(outcome)
    assert f"{claim.expected:+.2f}" in claim.sentence
    assert not replace(claim, expected=claim.expected + 0.01).check(claim.measure(ROOT / "outputs")).holds


def rows_of_readme() -> list[dict[str, str]]:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    heads = next(cells for cells in lines if cells[:3] == ["repair", "network", "failures"])
    return [dict(zip(heads, cells)) for cells in lines if len(cells) == len(heads) and cells[0] in ("gate", "search")]


@pytest.mark.parametrize("row", rows_of_readme(), ids=lambda row: "-".join(list(row.values())[:3]))
def test_a_row_of_the_front_page_is_claimed(row):
    name = re.sub(r"\s+", "-", f"{row['repair']}-{row['network']}-{row['failures']}".lower())
    for column, suffix in COLUMNS.items():
        if row.get(column):
            claim = CLAIMS[name + suffix]
            assert float(row[column]) == pytest.approx(claim.expected, abs=0.006) and int(row["n"]) == claim.n


def test_the_front_page_has_such_a_table():
    assert len(rows_of_readme()) >= 5


@pytest.fixture
def claim():
    return next(iter(CLAIMS.values()))


@pytest.mark.parametrize("change, outcome", [({"expected": 99.0}, "differs by"), ({"n": 50}, "where 50 are claimed"),
                                             ({"records": "lite/none/*.json"}, "no records")])
def test_what_does_not_hold_says_how(claim, change, outcome):
    wrong = replace(claim, **change)
    result = wrong.check(wrong.measure(ROOT / "outputs"))
    assert not result.holds and outcome in str(result)


def test_the_command_exits_with_1_if_one_differs(tmp_path, monkeypatch):
    entry = (ROOT / "data" / "claims.toml").read_text(encoding="utf-8").split("[[claim]]")[1]
    (tmp_path / "data").mkdir()
    (tmp_path / "outputs").symlink_to(ROOT / "outputs", target_is_directory=True)
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    for text, status in ((entry, 0), (re.sub(r"expected = \S+", "expected = 77.0", entry), 1)):
        (tmp_path / "data" / "claims.toml").write_text(f"[[claim]]{text}", encoding="utf-8")
        ended = CliRunner().invoke(app, ["verify", "--all", "--from-records", "--json"])
        assert ended.exit_code == status and f'"holds": {str(not status).lower()}' in ended.output
    listed = CliRunner().invoke(app, ["verify"])
    assert listed.exit_code == 0 and "77.00" in listed.output


@pytest.mark.parametrize("text, message", [
    ("", "0 claims"), ("claim = 3", "0 claims"), ('[[claim]]\nid = "a"', "a has no sentence"), ("[[claim", "cannot read")])
def test_a_file_that_is_not_one_of_claims_is_one_line(tmp_path, text, message):
    path = tmp_path / "claims.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArchrepairError, match=message):
        read_claims(path)


def test_unknown_values_fields_and_twins_are_one_line(tmp_path, claim):
    path = tmp_path / "claims.toml"
    lines = [f"{key} = {value!r}" for key, value in vars(claim).items()]
    for text, message in (("\n".join(lines).replace(repr(claim.value), "'chnge'"), "change"), ("\n".join([*lines, "nn = 3"]), "nn"),
                          ("\n".join(lines) + "\n[[claim]]\n" + "\n".join(lines), "2 claims with 1 ids")):
        path.write_text(f"[[claim]]\n{text}", encoding="utf-8")
        with pytest.raises(ArchrepairError, match=message):
            read_claims(path)


def test_a_claim_is_measured_again_by_its_command(tmp_path):
    "At the smoke tier, within its tolerance; and with a tolerance of nothing it is noticed that it is another network."
    command = "archrepair compare --model resnet18 --dataset digits:fog:3 --tier smoke --seeds 0 --methods retrain"
    claim = Claim("again", "+10.00", "change", "smoke/records/digits~fog~3/resnet18/retrain-*.json", 1, 10.0, 30.0, command, 1, "one core")
    outcome = measure_again(claim, tmp_path)
    assert outcome.holds and outcome.n == 1 and len(list(tmp_path.glob(claim.records))) == 1
    assert not claim.check(claim.measure(tmp_path)).holds
    with pytest.raises(ArchrepairError, match="status 1"):
        measure_again(replace(claim, command=command.replace("resnet18", "resnet99")), tmp_path)
    with pytest.raises(ArchrepairError, match="expected an `archrepair compare`"):
        measure_again(replace(claim, command="archrepair repair"), tmp_path)


def test_the_report_says_what_fewer_failures_gave():
    folder = ROOT / "outputs" / "lite" / "records" / "cifar10~gaussian_noise~3" / "cifar-resnet20~published"
    fewer = folder.glob("archrepair-localized-clean-n*-s0-*.json")
    records = [Record.read(path) for path in (folder / "archrepair-localized-clean-s0.json", *fewer)]
    gains = {record.metrics["images"]["failures"]: record.accuracy() - record.accuracy(when="before") for record in records}
    assert {count: round(gain, 1) for count, gain in sorted(gains.items())} == GAIN_BY_FAILURES


def gain(record: Record) -> float:
    return record.metrics["candidates"]["repaired"]["after"]["held_out"]["accuracy"] - record.accuracy("held_out", "before")


def test_what_the_search_gains_over_a_place_at_random_follows_from_the_records():
    "Wherever an expert was trained to the end in every block, and on the front page."
    ahead = {}
    for path in sorted((ROOT / "outputs" / "lite" / "records").glob("*/cifar-resnet*~published/archrepair-localized-clean-s?.json")):
        searched, seed = Record.read(path), path.stem.rpartition("-s")[2]
        others = map(Record.read, path.parent.glob(f"archrepair-layer?-clean-s{seed}-*.json"))
        places = {other.cell["block"]: gain(other) for other in others if other.cell["options"] == [["control", False]]}
        places[searched.repair["block"]] = gain(searched)
        if len(places) > 2:
            ahead[searched.cell["model"].partition(":")[0], path.parts[-3].split("~")[1].replace("_", " "), seed] = (
                gain(searched) - sum(places.values()) / len(places))
    with (ROOT / "outputs" / "lite" / "tables" / "duels.csv").open(encoding="utf-8", newline="") as file:
        stored = {(row["network"], row["failures"], row["seed"]): float(row["searched − random"]) for row in csv.DictReader(file)}
    assert stored == {pair: pytest.approx(points, abs=0.001) for pair, points in ahead.items()} and len(stored) >= 4
    mean, won = sum(ahead.values()) / len(ahead), sum(points > 0 for points in ahead.values())
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"gains {mean:+.2f} points on average: {won} of {len(ahead)} differing pairs in favor" in page
