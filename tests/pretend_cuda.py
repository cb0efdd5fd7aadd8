"""A GPU that is not there: CUDA tensors without values, so that a step's devices and waits show.

Tensors on "cuda" are PyTorch's fake tensors: shapes, dtypes and devices as on a GPU, autocast's
CUDA lists included, no values. Tensors on "cpu" are real. So the code of a run goes its GPU way on
a machine without one, and

- an operation on tensors of two devices raises, as on a GPU (and indexing with a tensor of another
  device, which fake tensors let pass);
- whatever makes the host wait for the GPU is noted in `waits` with the place in our code: reading a
  value, a copy to the host, a copy from the host that is not `non_blocking`, one from memory that
  is not pinned and too large to be staged, an output whose shape depends on values;
- what was read is 0, so that the code after it goes on.

The backward pass walks the graph here, since PyTorch's engine asks the driver for streams.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common.fast.pixels import mean_and_std

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
# CUDA's documentation, "API synchronization behavior": up to so many bytes from pageable memory are
# staged at once, more may wait for the stream
STAGED_BYTES = 2**16
# outputs whose shape depends on values, and linear algebra that checks its result
WAITING = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "bincount"}
WAITING |= {"_linalg_eigh", "_linalg_svd", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
FUSED = {"_fused_sgd_", "_fused_adamw_", "_fused_adam_"}


@dataclass(frozen=True)
class Wait:
    """A wait of the host: its operation, and its places, `file:line function`, innermost first."""

    what: str
    where: tuple[str, ...]

    def within(self, *functions: str) -> bool:
        return any(place.split()[-1] in functions for place in self.where)

    def __str__(self) -> str:
        return f"{self.what} at {' < '.join(self.where[:4])}"


def places() -> tuple[str, ...]:
    """Returns the frames of this repository that are being run, innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path != __file__ and "site-packages" not in path:
            name = f"{Path(path).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
            found.append(name)
        frame = frame.f_back
    return tuple(found)


def is_fake(x: object) -> bool:
    return isinstance(x, FakeTensor)


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


class PretendCuda(TorchDispatchMode):
    """A mode in which work on CUDA tensors is checked instead of done."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []
        self.launches: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}  # kept, so that no other storage takes its place

    def wait(self, what: str) -> None:
        self.waits.append(Wait(what, places()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if name in ("_pin_memory", "pin_memory"):
            return self.pin(args[0])
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in self.pinned
        if not to_cuda and not any(map(is_fake, tensors)):
            return func(*args, **kwargs)
        return self.on_cuda(func, name, tensors, args, kwargs)

    def on_cuda(self, func, name: str, tensors: list[Tensor], args: tuple, kwargs: dict):
        if func.namespace == "c10d":
            return self.collective(func, args)
        if name == "_local_scalar_dense":
            self.wait("a value is read")
            return torch.zeros((), dtype=args[0].dtype).item()
        if name in ("_to_copy", "copy_"):
            out = self.copied(name, args, kwargs)
            if out is not None:
                return out
        if name in WAITING:
            self.wait(name)
        if name in INDEXING:
            args = (args[0], self.checked_indices(*args[:2]), *args[2:])
        if name in SYNC_BATCH_NORM:
            with self.fake:
                return SYNC_BATCH_NORM[name](*args)
        if name in FUSED:
            return check_fused(name, args)
        if name == "nonzero":
            return self.run(torch.ops.aten.zeros, (args[0].shape[0], args[0].ndim), torch.long)
        if name == "masked_select":
            return args[0].reshape(-1)
        if name == "equal":
            return True
        if func.namespace != "prim":
            self.launches[name] += 1
        with self.fake:
            return func(*args, **kwargs)

    def run(self, make, shape: tuple, dtype: torch.dtype) -> Tensor:
        with self.fake:
            return make(shape, dtype=dtype, device=CUDA)

    def pin(self, x: Tensor) -> Tensor:
        if is_fake(x):
            raise RuntimeError("cannot pin a CUDA tensor")
        copy = x.contiguous().clone()
        self.pinned[copy.untyped_storage()._cdata] = copy
        return copy

    def copied(self, name: str, args: tuple, kwargs: dict) -> Tensor | None:
        """Notes what a copy between devices waits for; one to the host gives zeros."""
        if name == "copy_":
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_cuda = is_fake(target)
        else:
            (source,), non_blocking = args, kwargs.get("non_blocking", False)
            device = kwargs.get("device")
            to_cuda = is_fake(source) if device is None else torch.device(device).type == "cuda"
        if is_fake(source) and not to_cuda:
            self.wait("a copy to the host")
            if name == "copy_":
                return target.zero_()
            dtype = kwargs.get("dtype") or source.dtype
            return torch.zeros(source.shape, dtype=dtype)
        if is_fake(source) or not to_cuda:
            return None
        if not non_blocking and source.numel():
            self.wait("a blocking copy from the host")
        elif not self.is_pinned(source) and source.nbytes > STAGED_BYTES:
            self.wait(f"a copy of {source.nbytes} bytes from pageable memory")
        return self.arrived(name, source, args, kwargs)

    def arrived(self, name: str, source: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Returns what a copy from the host gives, as if `source` had been on the GPU."""
        with self.fake:
            like = torch.empty_strided(
                source.shape, source.stride(), dtype=source.dtype, device=CUDA
            )
            if name == "copy_":
                return args[0].copy_(like)
            return torch.ops.aten._to_copy(like, **{**kwargs, "device": CUDA})

    def is_pinned(self, x: Tensor) -> bool:
        # a tensor that lies apart in memory is first gathered, in memory that is not pinned
        return (
            x.is_contiguous() or is_channels_last(x)
        ) and x.untyped_storage()._cdata in self.pinned

    def on_host(self, state: object) -> object:
        """Returns the same tree with zeros for CUDA tensors, in their layout, for torch.save."""

        def zeros(x: object) -> object:
            if not is_fake(x):
                return x
            self.wait("torch.save")
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_()

        return tree_map(zeros, state)

    def checked_indices(self, x: Tensor, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Returns the indices; for a boolean one as if it were true everywhere."""
        checked: list[Tensor | None] = []
        for index in indices:
            if index is None:
                checked.append(None)
                continue
            if is_fake(index) and not is_fake(x):
                raise RuntimeError(f"a CPU tensor is indexed by one on {index.device}")
            if not is_fake(index):
                self.wait("an index from the host")
            if index.dtype in (torch.bool, torch.uint8):
                self.wait("a boolean index")
                rows = self.run(torch.zeros, (index.numel(),), torch.long)
                checked += [rows] * index.ndim
            else:
                checked.append(index)
        return checked

    def collective(self, func, args: tuple):
        """Runs a collective after checking its tensors: NCCL takes dense ones of one device."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if not all(map(is_fake, tensors)):
            raise RuntimeError(f"{func} of tensors on {[x.device for x in tensors]}")
        in_place = "gather" not in func._schema.name  # any one order in memory does
        if not all(x.is_contiguous() or (in_place and is_channels_last(x)) for x in tensors):
            raise RuntimeError(f"{func} of a tensor that is not contiguous")
        self.launches[func._schema.name] += 1
        with self.fake:
            return func(*args)


def column_values(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Returns so many float32 (C,) of an input (N,C,…), in float32 whatever its own dtype."""
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(columns))


# nn.SyncBatchNorm's own operations: fake tensors have no rule for them
SYNC_BATCH_NORM = {
    "batch_norm_stats": lambda x, eps: column_values(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: column_values(x, 2),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: column_values(x, 4),
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
}


def check_fused(name: str, args: tuple) -> None:
    """Checks what fused kernels need: equal dtype, device, sizes and strides (ForeachUtils.h)."""
    lists = [part for part in args if isinstance(part, (list, tuple)) and part]
    lists = [part for part in lists if part[0].ndim or part is lists[0]]  # not the counts of steps
    for group in zip(*lists, strict=True):
        for other in group[1:]:
            like = group[0]
            same = (other.device, other.dtype, other.shape) == (like.device, like.dtype, like.shape)
            if not (same and strides(other) == strides(like)):
                raise RuntimeError(f"{name} of tensors that differ: {like} and {other}")


def strides(x: Tensor) -> list[int]:
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size != 1]


# -- the backward pass ----------------------------------------------------------------------------


@torch.no_grad()
def backward(root: Tensor, gradient: Tensor | None = None, *_, **__) -> None:
    """Acts as Tensor.backward for fake tensors: every node once, after all that come before it."""
    start = torch.ones_like(root) if gradient is None else gradient
    waiting, incoming = inputs_of_nodes(root.grad_fn), {root.grad_fn: {root.output_nr: start}}
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        for (parent, number), grad in zip(
            node.next_functions, run_node(node, incoming), strict=True
        ):
            if parent is None:
                continue
            if grad is not None:
                grad = as_expected(grad, parent._input_metadata[number])
                slots = incoming.setdefault(parent, {})
                slots[number] = slots[number] + grad if number in slots else grad
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)


def inputs_of_nodes(root) -> Counter:
    """Counts how many edges lead to each node."""
    edges, seen, todo = Counter(), {root}, [root]
    while todo:
        for parent, _ in todo.pop().next_functions:
            if parent is None:
                continue
            edges[parent] += 1
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return edges


def run_node(node, incoming: dict) -> tuple:
    """Returns the gradients of a node's inputs; a leaf takes its own and gives none."""
    slots = incoming.pop(node, {})
    if hasattr(node, "variable"):
        accumulate(node.variable, slots.get(0))
        return ()
    if not slots:
        return (None,) * len(node.next_functions)
    grads = [slots.get(n) for n in range(len(node._input_metadata))]
    out = node.apply(*grads) if hasattr(node, "apply") else node(*grads)
    # a Function of ours answers for all its arguments, tensors first
    return (out if isinstance(out, tuple) else (out,))[: len(node.next_functions)]


def as_expected(grad: Tensor, meta) -> Tensor:
    """Returns a gradient in its value's dtype, summed where the forward pass broadcast, as the
    engine does between two nodes (validate_outputs).
    """
    if grad.device != meta.device:
        raise RuntimeError(f"a gradient is on {grad.device}, its value on {meta.device}")
    shape = [*meta.shape]
    grad = grad if [*grad.shape] == shape else grad.sum_to_size(shape)
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)


def accumulate(leaf: Tensor, grad: Tensor | None) -> None:
    """Sets or adds to `leaf.grad`, in the leaf's own layout (accumulate_grad.h)."""
    if grad is None:
        return
    if leaf.grad is not None:
        leaf.grad += grad
    else:
        leaf.grad = torch.empty_like(leaf).copy_(grad)


def moved(module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """Acts as nn.Module._apply, with new parameters in place of the old. PyTorch's swaps fake ones,
    which it cannot while the fake mode remembers them.
    """
    for child in module.children():
        moved(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = fn(parameter.detach())
            module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


# -- torch.cuda, as on a machine with one GPU -----------------------------------------------------


@contextlib.contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """Provides one GPU that is not there, until the end of the block."""
    mode = PretendCuda()
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "no GPU",
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: mode.wait("torch.cuda.synchronize"),
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        accelerator = torch.accelerator  # what a loader asks before it pins its batches
        stack.enter_context(mock.patch.object(accelerator, "is_available", lambda: True))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # PyTorch's own way without a driver, which it would not take if there seems to be one
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        amp = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(amp, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", moved))
        save = torch.save
        stack.enter_context(
            mock.patch.object(torch, "save", lambda state, file: save(mode.on_host(state), file))
        )
        real = Tensor.backward

        def either(tensor: Tensor, *args, **kwargs) -> None:
            (backward if is_fake(tensor) else real)(tensor, *args, **kwargs)

        stack.enter_context(mock.patch.object(Tensor, "backward", either))
        # torch.tensor then makes its value on the host and copies it, as it does on a GPU
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(mode)
        mean_and_std.cache_clear()  # what it keeps is of one pretended GPU
        stack.callback(mean_and_std.cache_clear)
        yield mode
