"""A memory that runs out on purpose."""
from collections import Counter

import torch

from archrepair.training.fit import Recipe


def fits_only(monkeypatch, most: int) -> Counter:
    "From now on a loss of more than so many rows does not fit; the sizes of those that were tried."
    sizes, loss = Counter(), Recipe.loss

    def limited(recipe, logits, *answers):
        sizes[len(logits)] += 1
        if len(logits) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss(recipe, logits, *answers)

    monkeypatch.setattr(Recipe, "loss", limited)
    return sizes
