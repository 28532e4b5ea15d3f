"""What the comparison of the fixture `project` compares."""
from archrepair.experiments.cells import Cell

from .finished import DATASET

CELL = Cell(dataset=DATASET, tier="smoke")
METHODS = ["archrepair", "retrain:views=2"]
VERSIONS = ["own", "contrast:5", "clean"]
