"""What a terminal shows of a repair: the sets of images, the verdict, and each thing once."""
import pytest

from archrepair.cli.outcomes import show_record
from archrepair.experiments.cells import Record
from support import ROOT

FOG = ROOT / "outputs" / "lite" / "records" / "cifar10~fog~3"


@pytest.mark.parametrize(("folder", "pattern", "limits"), [("cifar-resnet20~published", "archrepair-localized-clean-s0.json", 1),
                                                           ("resnet18", "archrepair-localized-clean-s0-*.json", 0)])
def test_a_repair_ends_with_its_verdict_and_says_the_limit_once(capsys, folder, pattern, limits):
    path, *_ = sorted((FOG / folder).glob(pattern))
    record = Record.read(path)
    show_record(record, "out")
    lines = capsys.readouterr().out.splitlines()
    assert sum("of the answers can change" in line for line in lines) == limits
    verdict, = [line for line in lines if line.startswith(("accepted", "rejected"))]
    assert verdict.endswith(record.repair["verdict"].rpartition(" (loss: ")[2]) and verdict.startswith(record.repair["verdict"][:30])
    assert limits or verdict == record.repair["verdict"]
    assert f"{record.accuracy('held_out'):.2f}" in "\n".join(lines)
