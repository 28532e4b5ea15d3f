"""What the weights expect of their inputs, and words on the command line."""
import pytest
import torch

from archrepair import ArchRepair, Normalize, load_dataset, predict
from archrepair.data.images import STATISTICS
from archrepair.experiments.originals import build_network
from archrepair.core.tiers import TIERS
from support.bring import Kind, one_line
from support.finished import fails

NORMALIZATION = Kind("Normalization", "`--normalize NAME` beside `--weights`: cifar10, imagenet and the like, none, or MEAN/STD of "
                                      "pixels from 0 to 1.")
SETTINGS = Kind("Settings", "`ArchRepair(search_options={…})` and `-S NAME=VALUE`; `-p NAME=VALUE` for notebooks.")


NAMED = {
    "`imagenet`, or another known dataset": ("its published constants", "imagenet", Normalize(*STATISTICS["imagenet"])),
    "`none`": ("pixels from 0 to 1", "none", Normalize((0.0,) * 3, (1.0,) * 3)),
    "`0.5/0.25`": ("one number for all channels", "0.5/0.25", Normalize((0.5,) * 3, (0.25,) * 3)),
    "`0.4,0.5,0.6/0.2,0.2,0.3`": ("a number per channel", "0.4,0.5,0.6/0.2,0.2,0.3", Normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))),
}


@NORMALIZATION.each("word, transform", NAMED)
def test_normalization(evaluate, trained_weights, word, transform):
    torch.save(trained_weights(), "w.pt")
    test = load_dataset("digits", "test")
    network = build_network("resnet18", load_dataset("digits"), TIERS["smoke"])
    network.load_state_dict(trained_weights())
    correct = predict(network, test, transform).argmax(1) == test.labels
    score = evaluate("--dataset", "digits", "--weights", "w.pt", "--normalize", word)
    assert score.accuracy == pytest.approx(100 * correct.float().mean().item(), abs=0.01)


@NORMALIZATION.one_line("any other word", "lists what there is")
def test_other_words(here, capsys, trained_weights):
    torch.save(trained_weights(), "w.pt")
    words = ("--dataset", "digits", "--tier", "smoke", "--weights", "w.pt", "--normalize", "imagnet")
    assert "normalize is 'imagnet'; expected cifar10, " in fails(capsys, "evaluate", *words)


@SETTINGS.one_line("a setting that does not exist, `max_skips`", "suggests the nearest, max_skip")
def test_a_misspelled_setting():
    with one_line("max_skips.*did you mean 'max_skip'"):
        ArchRepair(strategy="pc-darts", search_options={"max_skips": 2})
