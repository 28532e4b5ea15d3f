"""Files of weights: whatever is in them, the network takes them or stays as it was."""

import argparse
import collections
import datetime
import functools
import io
import json
import os
import pickle
import zipfile

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from archrepair.networks.weights import load_weights
from support.fuzz import HOSTILE, attempt, broken, damage, filename, fuzz, ground, text
from support.states import same_state

KIND = "checkpoints"


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return network().state_dict()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


class Bomb:
    "An object that does something when it is unpickled."

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


BOMBS = [
    lambda: Bomb(os.system, "touch xss"),
    lambda: Bomb(eval, "open('xss', 'w')"),
    lambda: Bomb(os.mkdir, "xss"),
    lambda: Bomb(open, "xss", "w"),
    lambda: Bomb(bytearray, 1 << 34),
    lambda: Bomb(torch.zeros, 1 << 34),
    lambda: Bomb(print, "xss"),
    lambda: Bomb(np.zeros, 1 << 34),
    lambda: datetime.datetime(2020, 1, 1),
    lambda: network(),
    lambda: {1, 2},
    lambda: slice(1),
]
PICKLES = [
    b"c__builtin__\neval\n(S'1'\ntR.",
    b"cos\nsystem\n(S'touch xss'\ntR.",
    b"\x80\x02cos\x0asystem\x0a.",
    b"c<xss-a>\n\x1b[31m\ntR.",
    b"cos\n" + b"a" * 5000 + b"\n.",
    b"(" * 3000 + b".",
    b"]" * 20_000 + b".",
    b"\x80\xff.",
    b"N.",
    b"J\xff\xff\xff\x7f.",
    b"\x80\x02]q\x00" + b"h\x00a" * 9 + b".",
    b"\x80\x02X\xff\xff\xff\x7f",
]
dtypes = st.sampled_from(
    [torch.float32] * 4
    + [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.uint16,
    ]
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    "Tensors of all kinds."
    kind = draw(st.sampled_from(["plain"] * 4 + ["expanded", "sparse", "quantized", "parameter", "nan", "view", "meta"]))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4))
    if kind == "expanded":
        return torch.zeros(1).expand(1 << 40)
    if kind == "meta":
        return torch.zeros(shape, device="meta")
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8)
    value = torch.full(shape, float("nan")) if kind == "nan" else torch.zeros(shape, dtype=draw(dtypes))
    if kind == "parameter":
        return nn.Parameter(value, requires_grad=False)
    return (
        value.to_sparse()
        if kind == "sparse" and shape and value.dtype == torch.float32
        else value.T
        if kind == "view" and len(shape) == 2
        else value
    )


others = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    text,
    st.binary(max_size=9),
    st.just([1, (2,)]),
    st.just(np.float64(1)),
    st.just(np.int64(3)),
    st.just(argparse.Namespace(lr=0.1)),
    st.just(collections.OrderedDict(a=1)),
    st.sampled_from(BOMBS).map(lambda make: make()),
)
prefixes = st.one_of(st.sampled_from(["", "", "", "module.", "_orig_mod.", "model.", "a.b.c.", ".", "module.module."]), text)
entries = st.one_of(
    st.sampled_from(["state_dict", "model", "ema", "net", "optimizer", "state_dict_ema", "params", "epoch", "loss_net"]), text
)


@st.composite
def states(draw: st.DrawFn) -> dict:
    "A state dict of the network with a few changes."
    state = dict(weights())
    if draw(st.booleans()):
        kind = draw(dtypes)
        state = {name: value.to(kind) for name, value in state.items()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(weights())))
        how = draw(st.sampled_from(["tensor", "other", "remove", "rename"]))
        if how in ("remove", "rename"):
            value = state.pop(name, None)
            state |= {draw(text): value} if how == "rename" else {}
        else:
            state[draw(st.sampled_from([name, "total_ops", "n_averaged", "x.num_batches_tracked", 7, ("a",)]))] = draw(
                tensors() if how == "tensor" else others
            )
    prefix = draw(prefixes)
    return {f"{prefix}{name}" if isinstance(name, str) else name: value for name, value in state.items()}


nests = st.recursive(
    st.one_of(states(), states(), tensors(), others), lambda inner: st.dictionaries(entries, inner, min_size=1, max_size=3), max_leaves=4
)


sound = st.tuples(
    st.sampled_from(["", "", "module.", "model.net."]), st.sampled_from(["", "", "state_dict", "model", "ema"]), dtypes, others
).map(
    lambda how: nest(
        {f"{how[0]}{name}": value.to(how[2]) if value.is_floating_point() else value for name, value in weights().items()}, how[1], how[3]
    )
)


def nest(state: dict, entry: str, beside: object) -> dict:
    "A state dict, or a checkpoint with it at this entry and something beside it."
    return {entry: state, "epoch": beside} if entry else state


def as_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def as_old_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_safetensors(content: object) -> bytes:
    found = content if isinstance(content, dict) else weights()
    fits = lambda value: (
        isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
    )
    flat = {
        name: value.detach().contiguous().clone()
        for name, value in found.items()
        if isinstance(name, str) and fits(value) and value.numel() < 1000
    }
    return save({name.encode("utf-8", "replace").decode(): value for name, value in flat.items()})


def as_zip(content: object) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../up", b"\0" * 1_000_000)
    return file.getvalue()


def header(content: dict) -> bytes:
    "A safetensors file of a header alone."
    lines = json.dumps(content).encode()
    return len(lines).to_bytes(8, "little") + lines + bytes(64)


WRITERS = [as_torch, as_torch, as_torch, as_old_torch, as_safetensors, as_zip, lambda content: pickle.dumps(content, 2)]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    "The bytes of a file."
    how = draw(st.sampled_from(["written"] * 8 + ["bytes", "pickle", "header"]))
    if how == "bytes":
        return draw(st.binary(max_size=64))
    if how == "pickle":
        return draw(st.sampled_from(PICKLES))
    if how == "header":
        spans = st.lists(st.sampled_from([0, 4, 64, 2**40, 2**63, -1, 1.5, "0"]), max_size=3)
        entry = st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "XXX", 3]), "shape": spans, "data_offsets": spans}
        )
        return header(draw(st.dictionaries(st.one_of(text, st.sampled_from(sorted(weights()))), st.one_of(entry, text), max_size=3)))
    content = draw(st.one_of(sound, nests))
    try:
        written = draw(st.sampled_from(WRITERS))(content)
    except Exception:  # what cannot be written is nobody's file
        written = as_torch(weights())
    return damage(written, draw(broken))


def loop() -> bytes:
    "A file that holds itself."
    content = {"state_dict": dict(weights())}
    content["model"] = content
    return as_torch(content)


@given(
    files(),
    st.one_of(st.sampled_from(["w.pt", "w.safetensors", "w.pth.tar", "w#1.pt"]), filename),
    st.one_of(st.just(""), st.just(""), entries),
)
@example(loop(), "w.pt", "")
@example(as_torch({"state_dict": weights(), "bomb": Bomb(os.system, "touch xss")}), "w.pt", "")
@example(as_torch({name: torch.zeros(1).expand(1 << 40) for name in weights()}), "w.pt", "")
@example(header({"conv.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "w.safetensors", "")
@fuzz(KIND)
def test_checkpoints(content, name, entry):
    with ground() as folder:
        (folder / name).write_bytes(content)
        model, path = network(), f"{folder / name}#{entry}" if entry else folder / name
        outcome = attempt(KIND, lambda: load_weights(model, path), folder)
        if outcome.line is not None:
            assert same_state(model, network()), "changed by a file that was refused"


def test_paths():
    "Paths that nobody has."
    for path in sorted({*HOSTILE, "a" * 5000} - {"/"}):  # which would be looked through as a whole
        with ground() as folder:
            attempt(KIND, functools.partial(load_weights, network(), path), folder, again=True)
