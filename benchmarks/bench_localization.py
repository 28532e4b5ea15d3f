"""What localization costs, in forward passes over its images, beside a plain loop over images and neurons.

    python benchmarks/bench_localization.py [--images 400] [--width 0.25] [--rounds 5]

Both sides run in this process on one thread, in turns; the counts are compared first. Prints one JSON object.
"""
import argparse
import json

import torch
from measure import Ratio, in_turn, quotients

from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.networks.models import create_model
from archrepair.networks.neurons import watch, wire
from archrepair.repair.localization import failure_gradients, spectrum
from archrepair.training.rows import Rows, image_features


def plain_spectrum(network, rows, wiring, batch_size):
    "Keep every neuron's value for every image, then count with loops and list membership."
    values = {layer: [] for layer in wiring.layers}
    wrong, right = [], []
    with torch.inference_mode():
        for positions in torch.arange(len(rows)).split(batch_size):
            with watch(network, wiring, lambda layer, z, view: values[layer].append(view(z).mean(-1))):
                logits = network(rows.inputs(positions)[0])
            for row, said in zip(positions.tolist(), logits.argmax(1).tolist()):
                (right if said == int(rows.labels[row]) else wrong).append(row)
    counts = []
    for layer in wiring.layers:
        layer_values = torch.cat(values[layer]).tolist()
        for neuron in range(wiring.layers[layer]):
            count = [0, 0, 0, 0]
            for image in range(len(rows)):
                active = layer_values[image][neuron] > 0
                if image in wrong:
                    count[0 if active else 1] += 1
                elif image in right:
                    count[2 if active else 3] += 1
            counts.append(tuple(count))
    return counts


def plain_forward(network, rows, batch_size):
    with torch.inference_mode():
        for positions in torch.arange(len(rows)).split(batch_size):
            network(rows.inputs(positions)[0])


def plain_gradients(network, rows, failures, wiring):
    "One image at a time."
    total = {layer: 0 for layer in wiring.layers}
    for row in failures.tolist():
        network.zero_grad()
        x, _ = rows.inputs(torch.tensor([row]))
        torch.nn.functional.cross_entropy(network(x), rows.labels[[row]]).backward()
        for layer in total:
            total[layer] = total[layer] + network.get_submodule(layer).weight.grad
    return torch.cat([(t / len(failures)).abs().flatten(1).mean(1) for t in total.values()]).numpy()


def measure(images: int = 400, width: float = 0.25, rounds: int = 5) -> dict:
    "Both sides compared, then timed in turns; see the module."
    digits = load_dataset("digits")
    network = create_model("resnet18", 10, width=width, stem_stride=1)
    rows = Rows([image_features(digits.select(torch.arange(images)), Normalize.of(digits))])
    wiring = wire(network, rows.inputs(torch.arange(1))[0])
    counted = spectrum(network, rows, wiring, batch_size=100)
    assert plain_spectrum(network, rows, wiring, 100) == list(zip(counted.am, counted.nm, counted.ac, counted.nc))
    failures = counted.failures[:images // 10]  # the paper's share: 1,000 failures beside 10,000 images
    ours, plain = failure_gradients(network, rows, failures, wiring), plain_gradients(network, rows, failures, wiring)
    assert abs(ours - plain).max() <= 1e-4 * plain.max()

    seconds = in_turn({
        "forward": lambda: plain_forward(network, rows, 100),
        "spectrum": lambda: spectrum(network, rows, wiring, batch_size=100),
        "gradients": lambda: failure_gradients(network, rows, failures, wiring),
        "plain spectrum": lambda: plain_spectrum(network, rows, wiring, 100),
        "plain gradients": lambda: plain_gradients(network, rows, failures, wiring),
    }, rounds)
    ratios = {name: quotients(times, seconds["forward"]) for name, times in seconds.items()}
    total = [a + b for a, b in zip(ratios["spectrum"], ratios["gradients"])]
    plain_total = [a + b for a, b in zip(ratios["plain spectrum"], ratios["plain gradients"])]
    return {"images": images, "failures": len(failures), "neurons": wiring.size, "rounds": rounds, "forwards": ratios,
            "total": total, "plain total": plain_total}


def cases(rounds: int = 5):
    "The lines of the table."
    result = measure(rounds=rounds)
    limit = 1 + 3 * result["failures"] / result["images"]  # one forward of all, and one with a backward of the failures
    yield Ratio.of("localization", "localization, ResNet-18 ×0.25", "forward passes of its images", result["total"], unit="forwards",
                   limit=round(limit, 2), goal=1.32)
    yield Ratio.of("localization", "localization, ResNet-18 ×0.25", "a loop over images and neurons",
                   quotients(result["plain total"], result["total"]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(args.images, args.width, args.rounds), indent=1))


if __name__ == "__main__":
    main()
