"""What a computation needs, found by running it on tensors that have a shape and no content.

The model lies on torch's ``meta`` device, so a model of any size takes no memory; what a step reads (token ids, masks)
is real. The very code of the stages runs, forward and backward, and :class:`Trace` keeps the books."""

from __future__ import annotations

import ctypes
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
PREPARED = 600 * 1024  # bytes that oneDNN keeps of a product that it has met (with AVX-512; float32 and bfloat16 alike)
KEPT = 1024  # products that it keeps at most


class Rates(NamedTuple):
    """How fast a machine computes."""

    flops: float  # floating-point operations a second, in matrix products
    bytes: float  # read and written a second, in copies
    call: float  # seconds that calling any operation costs


def measure_rates(width: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Rates:
    """The rates of this machine, each measured for ``seconds``, with products of matrices ``width`` numbers wide."""
    left, right = torch.rand(1024, width, device=device, dtype=dtype), torch.rand(width, 3 * width, device=device)
    right = right.to(dtype)
    block, one = torch.rand(2**24, device=device), torch.rand(8, device=device)
    target = torch.empty_like(block)
    return Rates(
        2 * left.numel() * right.shape[1] / _seconds_of(lambda: left @ right, device, seconds),
        2 * block.nbytes / _seconds_of(lambda: target.copy_(block), device, seconds),
        _seconds_of(lambda: one + one, device, seconds),
    )


def _seconds_of(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds a call: the best of ten shares of the time, for what else the machine does only ever slows it down."""
    function()
    best = float("inf")
    for _ in range(10):
        calls, begun = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - begun < seconds / 10:
            function()
            calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begun) / calls)
    return best


class Heap:
    """The C library's own allocator, whose waste is part of what a process on a CPU takes.

    Blocks are asked for and given back as torch does it, and never written to. Small ones come out of a heap that
    grows in one piece and keeps its holes, large ones from the system. A page of the heap counts from the first block
    on that lies there, until the heap ends before it; one that earlier work has left in RAM does not."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.sbrk.restype = ctypes.c_size_t
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        self._mapped: dict[int, int] = {}  # address -> size of the blocks outside of the heap
        self._outside = 0  # bytes in them
        self._begin, self._pages = self._in_ram()
        self._taken = 0  # pages, more than when this object was made

    @classmethod
    def of_this_system(cls) -> Heap | None:
        """None where processes have no such heap."""
        return cls() if sys.platform == "linux" else None

    def take(self, size: int) -> int | None:
        """The address of a new block; None where there is no room for it."""
        place = ctypes.c_void_p()
        self._libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(size))
        address = place.value
        if address is None:
            return None
        self._follow_the_end()
        first = (address - self._begin) // PAGESIZE
        if not 0 <= first < len(self._pages):
            self._mapped[address] = size
            self._outside += size
        elif size > 0:
            block = self._pages[first : (address + size - 1 - self._begin) // PAGESIZE + 1]
            self._taken += len(block) - int(np.count_nonzero(block))
            block[:] = True
        return address

    def give_back(self, address: int | None) -> None:
        """Free a block."""
        self._outside -= self._mapped.pop(address, 0)
        self._libc.free(address)
        self._follow_the_end()

    @property
    def held(self) -> int:
        """Bytes that the allocator has from the system and that were in use, more than when this object was made."""
        return self._taken * PAGESIZE + self._outside

    def _follow_the_end(self) -> None:
        pages = (self._end() - self._begin) // PAGESIZE
        if pages < len(self._pages):  # given back to the system
            self._taken -= int(np.count_nonzero(self._pages[pages:]))
            self._pages = self._pages[:pages].copy()
        elif pages > len(self._pages):
            self._pages = np.concatenate([self._pages, np.zeros(pages - len(self._pages), dtype=bool)])

    def _in_ram(self) -> tuple[int, np.ndarray]:
        """(the address at which the heap begins; for each of its pages, whether it takes memory now)."""
        heap = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
        if not heap:
            return self._end(), np.zeros(0, dtype=bool)
        begin, end = (int(place, 16) for place in heap[0].split()[0].split("-"))
        pages = ctypes.create_string_buffer((end - begin) // PAGESIZE)
        self._libc.mincore(begin, end - begin, pages)
        return begin, np.frombuffer(pages.raw, dtype=np.uint8) % 2 == 1

    def _end(self) -> int:
        return int(self._libc.sbrk(ctypes.c_ssize_t(0)))


class Trace(TorchDispatchMode):
    """Counts bytes and time of what runs inside of it on the ``meta`` device.

    An operation takes ``max(FLOPs / rate, bytes / rate)`` and the cost of a call (the roofline model). Operations on
    real tensors run as ever and are not counted; where real and meta tensors meet, the result is meta.

    Args:
        model: whose weights and buffers are there from the start.
        rates: of the machine; None: times are not wanted.
        precision: of the trainer, in Lightning's words.
        heap: where blocks of memory come from; None: nothing is wasted, as in what torch says of a GPU.
        device: "cpu" or "cuda", which the computation is going to run on.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Rates | None = None,
        precision: str = "32-true",
        heap: Heap | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.rates = rates
        self.flops = 0.0
        self.seconds = 0.0
        self.met: set[tuple[Any, ...]] = set()  # products that a CPU leaves to oneDNN, which prepares each
        self.live = 0  # bytes
        self.peak = 0  # bytes that are taken at most
        self.heap = heap
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_meta and tensor.untyped_storage() not in self._known:
                self._note(tensor)
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        self._functions = _AsOnTheDevice(half, device)
        self._stack = ExitStack()
        for module in model.modules():  # what is computed again is computed alike: torch leaves such modes aside then
            if checkpoint.state(module) is not None:
                module.register_forward_pre_hook(lambda *_: self._enter_functions())
                module.register_forward_hook(lambda *_: self._functions.__exit__(None, None, None), always_call=True)

    def __enter__(self) -> Trace:
        super().__enter__()
        if self._functions.half is not None:  # for modules that ask: meta has no autocast, so it is said of the CPU
            self._stack.enter_context(torch.autocast("cpu", self._functions.half))
        self._stack.enter_context(self._functions)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)

    def _enter_functions(self) -> None:
        self._functions.__enter__()

    def hold(self, size: int) -> None:
        """From now on something else takes ``size`` bytes in one piece."""
        self._take(size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(t.is_meta for t in tensors):
            out = func(*args, **kwargs)
            if not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(out)):
                return out
        else:
            out = self._run(func, args, kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        fresh = [t for t in made if t.untyped_storage() not in self._known]
        for tensor in fresh:
            self._note(tensor)
        self._count(func, args, kwargs, out, tensors + made if fresh or func._schema.is_mutable else [])
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on meta tensors; where its result's shape depends on a real mask, with what that mask says."""
        if func is aten.index.Tensor:
            places = [p.nonzero(as_tuple=True) if p is not None and p.dtype == torch.bool else (p,) for p in args[1]]
            args = (args[0], [p for place in places for p in place])
        elif func is aten.masked_select.default:
            return args[0].new_empty(int(args[1].sum()))
        elif func is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        return func(*_meta(args), **_meta(kwargs))

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, touched: list[Tensor]) -> None:
        flops = _flops(func, args, kwargs, out)
        self.flops += flops
        if func is ONEDNN or (func in PRODUCTS and out.dtype in (torch.bfloat16, torch.float16)):
            self.met.add((func, *((t.shape, t.stride()) for t in args if isinstance(t, Tensor))))
        if self.rates is not None:
            size = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in touched)
            self.seconds += self.rates.call + max(flops / self.rates.flops, size / self.rates.bytes)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._give_back, size, self._take(size)).atexit = False

    def _take(self, size: int) -> int | None:
        self.live += size
        address = None if self.heap is None else self.heap.take(size)
        self.peak = max(self.peak, self.live if self.heap is None else self.heap.held)
        return address

    def _give_back(self, size: int, address: int | None) -> None:
        self.live -= size
        if self.heap is not None:
            self.heap.give_back(address)


def _meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) and not x.is_meta else x, tree)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return float(sdpa_flop_count(*(t.shape for t in args[:3])))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return float(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    if func is ONEDNN:
        return 2.0 * out.numel() * args[0].shape[-1]
    formula = flop_registry.get(func.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


class _AsOnTheDevice(TorchFunctionMode):
    """What the ``meta`` device does otherwise than a real one: positions, the kernel of attention, and autocast."""

    PRODUCTS = frozenset({F.linear, torch.addmm, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__})

    def __init__(self, half: torch.dtype | None, device: str) -> None:
        super().__init__()
        self.half = half
        self.attention = torch.float32 if device == "cpu" else half  # see lit_rlhf.models.attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange:  # positions are real: transformers reads the borders of packed sequences off them
            kwargs["device"] = "cpu"
        attention = func is F.scaled_dot_product_attention
        if self.half is not None and (attention or func in self.PRODUCTS):
            dtype = self.attention if attention else self.half
            args, kwargs = (tree_map(lambda x: self._cast(x, dtype), given) for given in (args, kwargs))
        if attention and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype | None) -> Any:
        floating = isinstance(x, Tensor) and x.is_meta and x.dtype in (torch.float32, self.half)
        return x.to(dtype) if floating else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that torch takes on a CPU; a GPU's fused kernels keep as much for the backward pass."""
    small = [torch.empty(1, t.shape[1], 1, t.shape[3], dtype=t.dtype) for t in (query, key, value)]
    if not torch._fused_sdp_choice(*small, dropout_p=dropout_p, enable_gqa=enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype, device="meta")
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors, shared memory counted once."""
    return sum({storage: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def optimizer_bytes(optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]) -> float:
    """Bytes of state that an optimizer keeps for each number that it trains: found by letting it take one step."""
    parameter = nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones_like(parameter)
    made = optimizer([{"params": [parameter]}])
    made.step()
    tensors = [t for t in made.state[parameter].values() if isinstance(t, Tensor) and t.numel() > 1]
    return sum(t.nbytes for t in tensors) / parameter.numel()
