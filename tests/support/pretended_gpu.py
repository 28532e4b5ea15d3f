"""A GPU that is not there: tensors that say they live on cuda:0, compute on the CPU, and refuse to be mixed with those of the CPU.

    with PretendedGPU() as gpu:
        network.to("cuda"); ...
    gpu.waits  # how often the host would have waited for the device, by line of the package

What a GPU refuses is refused: operations on tensors of two devices (but for CPU scalars), a CPU tensor indexed by one of the GPU,
`.numpy()`, a generator of the other device. Underneath, a `DeviceTensor` is a wrapper of a CPU tensor, and C++ takes it for one, so moves
between the two are made here, in Python. Speed and memory mean nothing.
"""
from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # now: it makes a list of functions, some of which are replaced below
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from archrepair.core.layout import LANES, lay_out
from support import ROOT

aten = torch.ops.aten
DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = str(ROOT / "archrepair")
MOVES = {aten.copy_.default, aten._to_copy.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
JOINING = {aten.cat.default, aten.stack.default}
WAITING = {  # the size or the value of what these give decides what the host does next
    aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select",
    aten.equal.default: "equal", aten._unique2.default: "unique", aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique", aten.repeat_interleave.Tensor: "repeat_interleave", aten.bincount.default: "bincount",
}
CONVOLUTIONS = {aten.convolution.default: 1, aten.convolution_backward.default: 2}  # and where their weight is; see `core.layout`
NOT_THERE = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class DeviceTensor(torch.Tensor):
    "A tensor on the pretended GPU; `host` holds its numbers."

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
                                                   dtype=host.dtype, layout=host.layout, device=HOST)

    def __init__(self, host: Tensor):
        self.host = host

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **{key: value for key, value in options.items() if key != "copy"})
        moved = _Fetched.apply(self) if device is not None and device.type == "cpu" else self
        changes = {key: value for key, value in (("dtype", dtype), ("memory_format", layout)) if value is not None}
        return Tensor.to(moved, **changes, copy=options.get("copy", False)) if changes or options.get("copy") else moved

    def cpu(self, *args: Any, **options: Any) -> Tensor:
        return _Fetched.apply(self)

    def cuda(self, *args: Any, **options: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(NOT_THERE)

    __array__ = numpy

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE, requires_grad=requires_grad)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = DeviceTensor(self.host.detach().clone(memory_format=torch.preserve_format))
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.cpu().detach().__reduce_ex__(protocol)  # it is read on a machine without this GPU

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU is used after that was left")


class _Fetched(torch.autograd.Function):
    "The same numbers on the CPU."

    @staticmethod
    def forward(ctx: Any, x: DeviceTensor) -> Tensor:
        _current().waits_for("copy to the host")
        return x.host.detach().clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return DeviceTensor(gradient)


class Generator(torch.Generator):
    "A generator that says it is of the GPU where that was asked for."

    place: str

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls, "cpu")
        generator.place = torch.device(device).type
        return generator

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return DEVICE if self.place == "cuda" else HOST


class PretendedGPU(TorchDispatchMode):
    "While it is entered, there is a GPU. `waits` counts what made the host wait for it, by place."

    entered: list[PretendedGPU] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.in_backward: list[bool] = []  # does the gradient under way come from the GPU?
        self.patches = ExitStack()

    def __enter__(self) -> PretendedGPU:
        assert not PretendedGPU.entered, "one GPU is enough"
        torch._C._ensureCUDADeviceGuardSet()  # C++ may name the device without a driver
        for owner, name, value in self._replacements():
            self.patches.enter_context(patch.object(owner, name, value, create=True))
        swap = torch.__future__.get_swap_module_params_on_conversion()
        self.patches.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters of a module keep their identity, as they do on a GPU
        PretendedGPU.entered.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        PretendedGPU.entered.remove(self)
        self.patches.close()

    def waits_for(self, what: str) -> None:
        "Count it at the innermost line of the package that led to it."
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        self.waits[f"{what} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else f"{what} elsewhere"] += 1

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, DeviceTensor)]
        wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        created = not tensors and bool(self.in_backward) and self.in_backward[-1]  # C++ makes zeros where it takes the device to be the CPU
        here = bool(ours) or wanted == "cuda" or created
        if ours:
            self._refuse_a_mixture(func, args, tensors)
        self._count(func, args, kwargs, ours, wanted)
        self._check_generator(kwargs.get("generator"), here)
        results = self._compute(func, flat, spec)
        wrappers = {id(x.host): x for x in ours}
        wrap = lambda x: wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x) if type(x) is Tensor else x
        results = tree_map(wrap, results) if here else results
        if ours and torch.Tag.inplace_view in func.tags:  # a shape that changes in place changes that of the wrapper, too
            with no_dispatch():
                func(*args, **kwargs)
        return args[0] if func is aten.copy_.default else results

    @staticmethod
    def _compute(func: Any, flat: list, spec: Any) -> Any:
        "The operation on the CPU."
        lower = lambda x: x.host if isinstance(x, DeviceTensor) else HOST if isinstance(x, torch.device) and x.type == "cuda" else x
        args, kwargs = tree_unflatten([lower(x) for x in flat], spec)
        if func in CONVOLUTIONS:
            weight, stride = args[CONVOLUTIONS[func]], args[3 if func is aten.convolution.default else 4]
            if tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and weight.shape[1] < LANES:
                args = tree_map(lambda x: lay_out(x, torch.contiguous_format) if isinstance(x, Tensor) else x, args)
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)

    @staticmethod
    def _refuse_a_mixture(func: Any, args: Any, tensors: list[Tensor]) -> None:
        if func in MOVES:
            return
        if func in INDEXING:
            if not isinstance(args[0], DeviceTensor):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            values = args[2] if len(args) > 2 else None
            strangers = [values] if isinstance(values, Tensor) and values.ndim and not isinstance(values, DeviceTensor) else []
        else:
            written = args[0] if func._schema.name.endswith("_") else None
            strangers = [x for x in tensors if not isinstance(x, DeviceTensor) and (x.ndim or func in JOINING or x is written)]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                               f"(of shape {tuple(strangers[0].shape)})")

    def _count(self, func: Any, args: Any, kwargs: Any, ours: list[DeviceTensor], wanted: str | None) -> None:
        if func in WAITING and ours:
            self.waits_for(WAITING[func])
        elif func is aten._to_copy.default and wanted == "cuda" and not ours and not kwargs.get("non_blocking"):
            self.waits_for("copy to the device")
        elif func is aten.copy_.default and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
            if not (kwargs.get("non_blocking") or len(args) > 2 and args[2]):
                self.waits_for("copy between host and device")
        elif func in INDEXING and ours:
            indices = [x for x in args[1] if x is not None]
            if not all(isinstance(x, DeviceTensor) for x in indices):
                self.waits_for("index of the host")
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.waits_for("mask")

    @staticmethod
    def _check_generator(generator: Any, here: bool) -> None:
        place, expected = getattr(generator, "place", "cpu"), "cuda" if here else "cpu"
        if generator is not None and place != expected:
            raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{place}'")

    # --- the machine

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        "What says that there is a GPU, and what C++ would decide without asking us."
        cuda, nothing = torch.cuda, lambda *args, **kwargs: None
        answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended GPU", "is_initialized": True,
                   "is_bf16_supported": True, "get_device_capability": (9, 0), "mem_get_info": (64 << 30, 80 << 30),
                   "memory_allocated": 1 << 29, "max_memory_allocated": 1 << 30}
        said = [(cuda, name, lambda *args, value=value, **kwargs: value) for name, value in answers.items()]
        silent = [(cuda, name, nothing) for name in ("_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats",
                                                     "set_rng_state", "manual_seed", "manual_seed_all")]
        grouped, parse = clip_grad._group_tensors_by_device_and_dtype, torch._C._nn._parse_to
        autocast, run, move = torch.autocast, torch.autograd._engine_run_backward, torch.Tensor.to

        def run_backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
            self.in_backward.append(any(isinstance(root, DeviceTensor) for root in roots))
            try:
                return run(roots, *args, **kwargs)
            finally:
                self.in_backward.pop()

        def placed(make: Any) -> Any:
            def make_there(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
                device = DEVICE if device is None and isinstance(data, DeviceTensor) else device
                result = make(data.host if isinstance(data, DeviceTensor) else data, *args, **kwargs)
                return result if device is None else result.to(device)
            return make_there

        def on_host(function: Any) -> Any:
            def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return DeviceTensor(function(x.host, *args, **kwargs)) if isinstance(x, DeviceTensor) else function(x, *args, **kwargs)
            return call

        def group(lists: Any, *args: Any) -> dict:  # C++ takes all of them to be on the CPU
            there = lambda key, value: (DEVICE, key[1]) if any(isinstance(x, DeviceTensor) for x in value[0][0]) else key
            return {there(key, value): value for key, value in grouped(lists, *args).items()}

        def parse_to(*args: Any, **kwargs: Any) -> Any:
            like = args and isinstance(args[0], DeviceTensor)
            return parse(DEVICE, args[0].dtype, *args[1:], **kwargs) if like else parse(*args, **kwargs)

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            like = args and isinstance(args[0], DeviceTensor)
            return move(tensor, DEVICE, args[0].dtype, *args[1:], **kwargs) if like else move(tensor, *args, **kwargs)

        return [*said, *silent, (cuda, "synchronize", lambda *args: self.waits_for("synchronize")),
                (cuda, "get_rng_state", lambda *args: torch.get_rng_state()),
                (torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu" if kind == "cuda" else kind, *args, **kwargs)),
                (torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode)),  # wrappers cannot be inference tensors
                (torch, "tensor", placed(torch.tensor)), (torch, "as_tensor", placed(torch.as_tensor)), (torch, "Generator", Generator),
                (torch.Tensor, "pin_memory", lambda tensor, *args: tensor), (torch.Tensor, "to", to),
                (torch.nn.functional, "one_hot", on_host(torch.nn.functional.one_hot)), (torch, "quantile", on_host(torch.quantile)),
                (torch._C._nn, "_parse_to", parse_to), (clip_grad, "_group_tensors_by_device_and_dtype", group),
                (torch.autograd, "_engine_run_backward", run_backward)]


def _current() -> PretendedGPU:
    return PretendedGPU.entered[-1]
