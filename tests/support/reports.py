"""Made-up results with everything a report can show, and a parser that checks its page."""
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pandas as pd
import torch
from torch import nn

from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import build_scenario
from archrepair.deploy.report import render_report
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import BlockGraph, Edge, Node
from archrepair.repair.result import RepairResult, changes
from archrepair.repair.verdict import Verdict
from archrepair.repair.votes import Localization
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import compare, evaluate, is_correct, predict

VOID = {"meta", "img"}

CLASSES = ("<script>alert(1)</script>", 'b"&\'', "ünïcode")

LOSSES = {"original": 1.0, "repaired": 0.25, "control": 0.5}

VERDICTS = {"repaired": Verdict("repaired", LOSSES, "the repaired block is no worse"),
            "control": Verdict("control", LOSSES, "plain fine-tuning validates better"),
            "original": Verdict("original", LOSSES, "no candidate validates better")}

RECORD = {"cell": {"method": "archrepair", "model": "resnet18", "dataset": "toy:fog:3", "tier": "smoke", "protocol": "clean", "seed": 7},
          "versions": {"archrepair": "9.9", "commit": "abc1234"}, "metrics": {}, "repair": {}, "path": "x.json"}


class Checked(HTMLParser):
    "Parses a page, closes every element in order and keeps what is needed below."

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {name}"
        self.seen.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.seen.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, name):
        return [attributes for element, attributes in self.seen if element == name]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def images(n: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randint(0, 256, (n, 8, 8, 3), generator=generator, dtype=torch.uint8), torch.arange(n) % 3, CLASSES, "toy")


def scenario_and_networks():
    "A scenario of 120 test images with its original and a network that answers differently."
    with torch.random.fork_rng():
        torch.manual_seed(1)
        original, repaired, control = (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)) for _ in range(3))
        repaired.append(nn.Linear(3, 3))
    train, test, clean = images(90, 0), images(120, 1), images(120, 2)
    right = is_correct(predict(original, test, Normalize.of(train)), test.labels)
    return {"original": original, "repaired": repaired, "control": control}, build_scenario(train, test, right, clean=clean, n_failures=20)


def metrics_of(networks, scenario, chosen):
    plain = lambda values: {name: asdict(value) for name, value in values.items()}
    evaluations = {name: evaluate(network, scenario) for name, network in networks.items()}
    before, after = evaluations["original"], evaluations[chosen]
    others = {name: {"after": plain(evaluation.scores), "change": plain(compare(before, evaluation, scenario))}
              for name, evaluation in evaluations.items() if name != "original"}
    return {"before": plain(before.scores), "after": plain(after.scores), "change": plain(compare(before, after, scenario)),
            "candidates": others, "images": {"failures": 18, "val_failures": 2, "train": 81, "val": 9, "held_out": 60}}


def searched() -> Genotype:
    graph = BlockGraph((Node((3, 8, 8)), Node((3, 8, 8)), Node((3, 8, 8), "F.relu")),
                       (Edge(0, 1, ("a",), 1), Edge(0, 2, None, 1), Edge(1, 2, ("b",), 1)), "conv")
    return Genotype(graph, ("original", "sep_conv", "none"), (1.0, 0.5, 0.0), (1, 1, 1))


def located() -> Localization:
    neurons = pd.DataFrame({"layer": ["a", "a", "b"], "channel": [0, 1, 0], "block": ["layer<1>", "layer<1>", "layer2"],
                            "s": [0.9, 0.8, 0.7], "g": [1.0, 2.0, 3.0], "s_hat": [0.9, 0.5, 0.1], "rank": [1, 2, 3]})
    summary = pd.DataFrame({"size": [2, 1], "count": [2, 0], "expected": [1.3, 0.7], "p": [0.33, 1.0]}, index=["layer<1>", "layer2"])
    counts = pd.DataFrame({2: [2, 0]}, index=summary.index)
    return Localization("layer<1>", list(summary.index), neurons, counts, summary, k=2, n_failures=20, n_correct=70, mean_gradient=2.0,
                        below=0.5, settings={"ties": "exact"}, warnings=["a doubt <b>"])


def make(parts, chosen="repaired", **more) -> RepairResult:
    networks, scenario = parts
    history = {"search": [{"epoch": 1, "loss": 0.9}], "finetune": [{"epoch": 0, "val": 0.8}, {"epoch": 1, "loss": 0.6, "val": 0.25}],
               "control": [{"epoch": 0, "val": 1.0}, {"epoch": 1, "loss": float("nan"), "val": 0.5}]}
    config = {"strategy": "pc-darts", "block": "layer<1>", "localized": True, "preset": "default", "seed": 7, "name": "archrepair",
              "points": {"repaired": 0.75, "control": 1.0}}
    result = RepairResult(
        model=networks[chosen], method="archrepair", block="layer<1>", genotype=searched(), verdict=VERDICTS[chosen],
        changed=changes(networks["original"].state_dict(), networks[chosen].state_dict()), history=history,
        cost=CostMeter(1234.4, 567.0, 8.9, 7.5, 10 * 2**20), control_cost=CostMeter(4321.0, 89.0, 1.2, 1.0, 11 * 2**20), config=config,
        localization=located(), candidates=dict(networks), metrics=metrics_of(networks, scenario, chosen),
        warnings=["beware of <i>this</i>"])
    return replace(result, **more)


def page_of(result: RepairResult, path="report.html", **more) -> str:
    "The page that `RepairResult.report` writes, as text; size and speed are not measured."
    return render_report(result.to_dict(), path, networks={**result.candidates, result.chosen: result.model}, **more)


def bare(parts) -> RepairResult:
    "A result of which everything that may be absent is absent."
    return make(parts, genotype=None, localization=None, candidates={}, metrics={}, history={}, warnings=[], config={},
                changed={"1.bias": "3/3"}, cost=CostMeter(), control_cost=CostMeter(), block=None)
