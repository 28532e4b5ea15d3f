"""One small network in every form in which people bring theirs, and a repair set for it."""
import functools
import logging
import threading
import types
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import RepairData

Make = Callable[[], nn.Module]


class Plain(nn.Module):
    "Two blocks of two convolutions, and a head."

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()

        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), norm(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), norm(b), nn.ReLU())

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block1, self.block2, self.fc = block(3, 8), block(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


@functools.cache
def data() -> RepairData:
    "Noise of 16 px in four classes."
    def images(n, seed):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.arange(n) % 4, tuple("abcd"), "noise", torch.arange(n))

    return RepairData(images(32, 0), images(64, 1), images(24, 2), Normalize(), images(16, 3))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_part(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    "The network with another module in the place of its first block."
    network = Plain()
    network.block1 = change(network.block1)
    return network


def holding(**things: object) -> nn.Module:
    "The network with some attributes."
    network = Plain()
    for name, value in things.items():
        setattr(network, name, value)
    return network


class Telling(Plain):
    def get_extra_state(self):
        return {"lock": threading.Lock}


class Silent(Plain):
    def train(self, mode=True):
        super().train(mode)  # and returns nothing


class Counting(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Remembering(Plain):
    def forward(self, x):
        self.features = self.block2(self.block1(x)).mean((2, 3))
        return self.fc(self.features)


class Delegating(Plain):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("fc"), name)


class Steps(Plain):
    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.tensor(3), requires_grad=False)


def remembered() -> nn.Module:
    network = Remembering().eval()
    network(torch.zeros(2, 3, 16, 16))
    return network


def compiled_forward() -> nn.Module:
    network = Plain()
    network.forward = torch.compile(network.forward, backend="eager")
    return network


def rebound() -> nn.Module:
    network = Plain()
    network.forward = types.MethodType(Plain.forward, network)
    return network


def watched() -> nn.Module:
    network = Plain()
    network.seen = []
    network.block1.register_forward_hook(lambda module, args, output: network.seen.append(output))
    network.register_forward_pre_hook(lambda module, args: network.seen.append(args))
    return network


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Plain()


# Networks that compute what `Plain` does: whatever is done with them gives the same numbers under the same names.
SAME: dict[str, Make] = {
    "data parallel": lambda: nn.DataParallel(Plain()),
    "compiled": lambda: compiled(Plain()),
    "compiled, in parallel": lambda: nn.DataParallel(compiled(Plain())),
    "compiled in place": lambda: (network := Plain(), network.compile(backend="eager"))[0],
    "compiled forward": compiled_forward,
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Plain()),
    "a part in parallel": lambda: with_part(nn.DataParallel),
    "a part compiled": lambda: with_part(compiled),
    "synchronized": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Plain()),
    "lock": lambda: holding(lock=threading.Lock()),
    "locks in a list": lambda: holding(locks=[threading.RLock(), {"at": threading.Condition()}]),
    "logger": lambda: holding(log=logging.getLogger("network")),
    "file": lambda: holding(file=open(__file__, encoding="utf-8")),  # noqa: SIM115
    "generator": lambda: holding(numbers=(i for i in range(3))),
    "stream": lambda: holding(stream=torch.Generator()),
    "lambda": lambda: holding(scale=lambda x: 2 * x),
    "Python module": lambda: holding(library=torch),
    "features kept": remembered,
    "extra state": Telling,
    "train returns nothing": Silent,
    "buffer counts": Counting,
    "attributes of a part": Delegating,
    "integer parameter": Steps,
    "forward as a method": rebound,
    "hooks look on": watched,
    "no gradients": lambda: Plain().requires_grad_(False),
    "made in inference mode": in_inference_mode,
    "channels last": lambda: Plain().to(memory_format=torch.channels_last),
}


def with_layers(change: Callable[..., object], *arguments: object) -> nn.Module:
    "The network with its convolutions changed in place."
    network = Plain()
    for module in [m for m in network.modules() if isinstance(m, nn.Conv2d)]:
        change(module, *arguments)
    return network


class Tied(Plain):
    "One kernel in both blocks."

    def __init__(self):
        super().__init__()
        self.block2[0].weight = self.block1[3].weight


def shrunk() -> nn.Module:
    network = Plain()
    network.block1.register_forward_hook(lambda module, args, output: output / 2)
    return network


# Networks that compute something of their own.
OTHER: dict[str, Make] = {
    "weight_norm": lambda: with_layers(parametrizations.weight_norm),
    "old weight_norm": lambda: with_layers(torch.nn.utils.weight_norm),
    "spectral_norm": lambda: with_layers(parametrizations.spectral_norm),
    "old spectral_norm": lambda: with_layers(torch.nn.utils.spectral_norm),
    "orthogonal": lambda: with_layers(parametrizations.orthogonal),
    "pruned": lambda: with_layers(prune.l1_unstructured, "weight", 0.5),
    "tied": Tied,
    "hooks change the answer": shrunk,
    "BatchNorm of each batch": lambda: Plain(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "BatchNorm without momentum": lambda: Plain(lambda c: nn.BatchNorm2d(c, momentum=None)),
    "BatchNorm without weights": lambda: Plain(lambda c: nn.BatchNorm2d(c, affine=False)),
    "dropout": lambda: Plain(lambda c: nn.Dropout2d(0.3)),
}


def quantized() -> nn.Module:
    "int8 throughout: no parameter is left."
    from torch.ao import quantization

    network = nn.Sequential(quantization.QuantStub(), Plain(lambda c: nn.Identity()), quantization.DeQuantStub()).eval()
    network.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(network, inplace=True)
    network(torch.rand(2, 3, 16, 16))
    return quantization.convert(network, inplace=True)


def dynamically_quantized() -> nn.Module:
    from torch.ao import quantization

    return quantization.quantize_dynamic(Plain().eval(), {nn.Linear})


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Plain().eval(), (torch.rand(2, 3, 16, 16),))


class Bound(Plain):
    "What runs is stored in a function."

    def __init__(self):
        super().__init__()
        self.functions = {"block": lambda x: self.block2(x)}

    def forward(self, x):
        return self.fc(self.functions["block"](self.block1(x)).mean((2, 3)))


class Locked(Plain):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


# What cannot be repaired: the network, and what is said.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "lazy": (lambda: with_part(lambda block: nn.LazyConv2d(8, 3)), "layer block1 is lazy and has no weights yet; run the network"),
    "quantized": (quantized, r"is quantized \(\w+\) and cannot learn; repair the float network"),
    "dynamically quantized": (dynamically_quantized, r"fc is quantized \(Linear\) and cannot learn; repair the float network"),
    "scripted": (lambda: torch.jit.script(Plain().eval()), "the network is TorchScript, whose modules cannot be replaced; give the Python"),
    "scripted part": (lambda: with_part(torch.jit.script), "block1 is TorchScript, whose modules cannot be replaced"),
    "exported": (lambda: exported().module(), "GraphModule is a program of torch.export, which has no eval mode"),
    "no parameters": (lambda: nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), "Sequential has no parameters that could learn"),
    "half": (lambda: Plain().half(), r"holds float16 weights; expected float32: give network.float\(\)"),
    "bfloat16": (lambda: Plain().bfloat16(), "holds bfloat16 weights; expected float32"),
    "double": (lambda: Plain().double(), "holds float64 weights; expected float32"),
    "meta": (lambda: Plain().to("meta"), "block1.0.weight is on the meta device, a shape without numbers"),
    "function of itself": (Bound, "Bound holds a function that calls block2 of this very network"),
    "not to be copied": (Locked, r"Locked cannot be copied \(TypeError: there is one of me\)"),
    "five channels": (lambda: with_part(lambda block: nn.Conv2d(5, 8, 3)), "the network takes images of 5 channels and gets 3"),
    "a class": (lambda: Plain, "not the class Plain: call it"),
    "a state dict": (lambda: Plain().state_dict(), r"not a mapping \(OrderedDict\): load it into one"),
    "a name": (lambda: "resnet18", r"not the name 'resnet18': give create_model\('resnet18', n_classes\)"),
    "a program": (exported, "of type ExportedProgram: give the network"),
}
