"""What the batched forms of the baselines are worth, beside a faithful naive run in the same process.

    python benchmarks/bench_baselines.py [CASE ...]

Each case compares results before times, on one thread, in process time. Prints one JSON object per case.
"""
import argparse
import copy
import json
import math
import statistics
import time

import torch

from archrepair.baselines import apricot, sensei
from archrepair.baselines.parts import patches
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.networks.models import create_model
from archrepair.training.rows import cache_features, image_features


def seconds(run, rounds=3):
    "Median process time of a call."
    durations = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        durations.append(time.process_time() - start)
    return statistics.median(durations)


def lite_network():
    "ResNet-18 as the lite tier has it, and 1,100 images."
    digits = load_dataset("digits")
    return create_model("resnet18", 10, width=0.25, stem_stride=2).eval(), digits.select(torch.arange(1100)), Normalize.of(digits)


def arachne_search(layer="fc", members=100, generations=100, naive_members=2):
    """One search of Arachne: 100 members × 100 generations × (900 failures + 200 guards).

    Naive: every member's weights are written into a copy of the network, and all images are sent through all of it; a few members
    are timed, the rest cost the same.
    """
    network, images, transform = lite_network()
    naive_rows = image_features(images, transform)
    there = patches.downstream(network, [layer])
    weight = there.modules[layer].weight
    sites = [patches.Site(layer, tuple(int(i) for i in torch.unravel_index(torch.tensor(n * weight.numel() // 12), weight.shape)))
             for n in range(12)]
    values = torch.randn(members, len(sites), generator=torch.Generator().manual_seed(0)) * weight.std()
    cache = lambda: cache_features(there.cut, images, transform)
    rows, population = cache(), patches.Population(there, sites)
    few = values[:naive_members]

    def naive():
        right = []
        for member in few:
            alone = patches.patch(copy.deepcopy(network), sites, member.tolist())
            with torch.inference_mode():
                logits = torch.cat([alone(naive_rows.batch(some)) for some in torch.arange(len(images)).split(500)])
            right.append(int((logits.argmax(1) == images.labels).sum()))
        return right

    assert naive() == population.tally(few, rows).right.int().tolist()
    batched, full = seconds(lambda: population.tally(values, rows)), seconds(naive) / naive_members * members
    search, plain = seconds(cache) + generations * batched, generations * full
    return {"layer": layer, "weights": len(sites), "members": members, "generations": generations, "images": len(images),
            "seconds per generation": round(batched, 4), "naive": round(full, 2), "ratio": round(full / batched),
            "seconds per search, cache included": round(search, 2), "naive search": round(plain), "search ratio": round(plain / search)}


def apricot_combination(failures=900, networks=20, rate=0.25):
    "The adjustment of all parameters for 900 failures: one weighted sum, and the loop of means over the failures."
    network, _, _ = lite_network()
    w = apricot.flat(network)
    generator = torch.Generator().manual_seed(0)
    others = w + 0.1 * torch.randn(networks, len(w), generator=generator)
    right = torch.rand(failures, networks, generator=generator) < rate

    def single():
        alpha, beta = apricot.combination(apricot.signs_of(right), 1e-3)
        return alpha * w + beta.float() @ others

    def loop():
        moving = w.clone()
        for row in right:
            if row.all() or not row.any():
                continue
            good, bad = others[row].mean(0), others[~row].mean(0)
            moving += 1e-3 * (row.float().mean() * (good - moving) - (~row).float().mean() * (bad - moving))
        return moving

    assert torch.allclose(single(), loop(), atol=1e-5) and not torch.allclose(loop(), w, atol=1e-3)
    one, many = seconds(single), seconds(loop, 1)
    return {"failures": failures, "networks": networks, "parameters": len(w), "seconds": round(one, 5), "naive": round(many, 3),
            "ratio": round(many / one)}


def sensei_variants(images=128, variants=10, size=32):
    """The variants of one batch of SENSEI: 128 images × 10 chromosomes.

    Naive: image by image and variant by variant by `torchvision.transforms.functional.affine`, four calls for the four moves as in the
    published code, or one call for all of them (chromosomes without shear, where it can be told exactly what to do: results are compared).
    """
    from torchvision.transforms.functional import InterpolationMode, affine

    generator = torch.Generator().manual_seed(0)
    pictures = load_dataset("digits").images[:images]
    if size != pictures.shape[1]:
        large = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2).float(), size=size, mode="bilinear")
        pictures = large.byte().permute(0, 2, 3, 1).contiguous()
    genes = torch.stack([torch.randint(-r, r + 1, (images, variants), generator=generator) for r in sensei.REACH], -1).to(torch.int8)
    unslanted = genes * torch.tensor([1, 1, 1, 0, 1, 1, 1], dtype=torch.int8)
    plain = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "interpolation": InterpolationMode.BILINEAR}

    def one(image, chromosome, single):
        turn, dx, dy, shear, zoom, brightness, contrast = (g * s for g, s in zip(chromosome, sensei.STEPS))
        if single:
            shift = [(1 + zoom) * dx * size, (1 + zoom) * dy * size]
            image = affine(image, **{**plain, "angle": turn, "translate": shift, "scale": 1 + zoom})
        else:
            for move in ({"angle": turn}, {"translate": [dx * size, dy * size]}, {"shear": [-math.degrees(math.atan(shear)), 0.0]},
                         {"scale": 1 + zoom}):
                image = affine(image, **{**plain, **move})
        return ((image + brightness).clamp(0, 255) * (1 + contrast)).clamp(0, 255)

    def naive(chromosomes, single):
        floats = pictures.permute(0, 3, 1, 2).float()
        return torch.stack([torch.stack([one(image, c, single) for c in row]) for image, row in zip(floats, chromosomes.tolist())])

    apart = (naive(unslanted, True) - sensei.variants(pictures, unslanted).permute(0, 1, 4, 2, 3)).abs()
    blurred = (naive(genes, False) - sensei.variants(pictures, genes).permute(0, 1, 4, 2, 3)).abs().mean()
    assert float(apart.max()) <= 1.0 and float(blurred) < 5, f"{float(apart.max())}, {float(blurred)} gray levels apart"
    batched = seconds(lambda: sensei.variants(pictures, genes))
    four, single = seconds(lambda: naive(genes, False)), seconds(lambda: naive(unslanted, True))
    return {"images": images, "variants": variants, "size": size, "seconds per batch": round(batched, 4),
            "naive, four calls": round(four, 3), "naive, one call": round(single, 3),
            "ratio": round(four / batched, 1), "ratio to one call": round(single / batched, 1),
            "largest difference, gray levels": round(float(apart.max()), 2),
            "mean difference to four resamplings": round(float(blurred), 2)}


CASES = {
    "arachne": arachne_search,
    "arachne, a convolution": lambda: arachne_search("layer4.1.conv2", members=20, naive_members=1),
    "apricot": apricot_combination,
    "sensei": sensei_variants,
    "sensei, 224 px": lambda: sensei_variants(images=8, size=224),
}


def cases(rounds=5):
    "The lines of the table: what is quick to measure; the ratio of these is that of medians."
    from measure import Ratio

    sides = {"arachne": ("a generation of Arachne on the last layer", "a full forward pass for each candidate"),
             "apricot": ("Apricot's combination for 900 failures", "a loop over the failures"),
             "sensei": ("SENSEI's variants of a batch", "one image and one variant at a time")}
    for name, (what, beside) in sides.items():
        ratio = float(CASES[name]()["ratio"])
        yield Ratio("baselines", what, beside, ratio, ratio, ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    args = parser.parse_args()
    if wrong := [case for case in args.cases if case not in CASES]:
        parser.error(f"unknown case {wrong[0]}; expected some of {', '.join(CASES)}")
    torch.set_num_threads(1)
    for name in args.cases or CASES:
        print(json.dumps({"case": name, **CASES[name]()}), flush=True)


if __name__ == "__main__":
    main()
