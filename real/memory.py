"""The memory of a real run: counted before it, refused where it cannot do, and read after it."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING

from sim.memory import MemoryPlan
from sim.spec import ModelSpec
from traces.errors import InputError
from traces.memory import check_free

if TYPE_CHECKING:  # torch takes seconds to be imported, and what is only counted needs none of it
    import torch

CUBLAS_BYTES = 32 * 2**20
"""What cuBLAS keeps on a GPU for its products: torch gives it this much on recent ones, and less on older ones."""
FULL = ("CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that come of a full GPU, beside those of torch's allocator."""


def on_gpu(device: str) -> bool:
    """Whether ``device``, a name as :func:`real.device.open_device` takes it, means a GPU."""
    if device != "auto":
        return device == "cuda"
    import torch

    return torch.cuda.is_available()


def workspace_bytes(spec: ModelSpec, *, lanes: int, rows: int, context: int, gpu: bool) -> int:
    """The most that a forward pass over ``rows`` tokens, padding included, holds beside the KV cache of its lanes.

    Counted are one MoE layer, with the rows gathered for its experts and what these give, and an expert that is kept
    quantised as it is computed with; one layer's attention over the whole context (:func:`attention_bytes`) and its
    dense or shared part; the logits of the last tokens; one layer's KV cache, twice while it grows; and cuBLAS. The
    parts do not all peak together, so that this is an upper bound.
    """
    element, routed = spec.bytes_per_element, rows * spec.top_k
    experts = routed * spec.hidden * (4 * element + 4) + rows * 4 * spec.expert_width * element
    attention = rows * (4 * spec.hidden + spec.head_dim * (3 * spec.heads + 2 * spec.kv_heads)) * element
    dense = rows * 4 * max(spec.dense_width, spec.shared_width) * element
    logits = lanes * spec.vocab * (element + 4)
    growing = lanes * context * spec.kv_bytes_per_token / spec.layers
    unpacked = 2 * spec.expert_elements * element if spec.expert_bits < 8 * element else 0
    attention += attention_bytes(spec, lanes=lanes, rows=rows, context=context, gpu=gpu)
    return int(experts + unpacked + attention + dense + logits + growing) + (CUBLAS_BYTES if gpu else 0)


def attention_bytes(spec: ModelSpec, *, lanes: int, rows: int, context: int, gpu: bool) -> float:
    """The most that one layer's attention makes of the KV cache of ``lanes * context`` tokens, which is C here.

    - The mask: 8 bytes by ``rows * context``.
    - Keys and values of all heads, where fewer are cached: ``2 * C * heads * head_dim`` elements. Latent ones are
      expanded in every step: ``3.5 * C * heads * head_dim``, as the rotary part is half a head, and the joint product
      is held beside the keys.
    - What torch's plain kernel copies, in fp32: of latent keys and values, as both are not equally wide, on the CPU
      ``4 * C * heads * head_dim``; of grouped ones in fp32 on a GPU ``4 * C * heads * head_dim``.
    - Scores, ``rows * heads * context``, where no fused kernel is used: 3 times in fp32 with the plain kernel, 4 times
      with the attention that transformers has for sinks (GPT-OSS), 6 times in fp32 with relative positions (Switch).
    """
    element, wide = spec.bytes_per_element, lanes * context * spec.heads * spec.head_dim
    scores, mask = rows * context * spec.heads, 8.0 * rows * context
    if spec.expert_matrices == 2:
        return mask + 6 * 4 * scores
    repeated = 2 * wide * element if spec.kv_heads < spec.heads else 0.0
    if spec.expert_biases:
        return mask + repeated + 4 * element * scores
    if spec.kv_elements:
        repeated, plain = 3.5 * wide * element, not gpu
    else:
        plain = gpu and element == 4 and spec.kv_heads < spec.heads
    return mask + repeated + (4 * (4 * wide + 3 * scores) if plain else 0)


def check_room(spec: ModelSpec, plan: MemoryPlan, *, gpu: bool) -> None:
    """Raises :class:`InputError` for a run that the free memory of the host, or of the GPU, does not hold.

    The host holds all experts, and where no GPU is used also what stands for one.
    """
    experts_bytes = spec.moe_layers * spec.experts * spec.expert_bytes
    weights_bytes = experts_bytes + spec.dense_bytes
    beside_bytes = 0 if gpu else plan.total_bytes - plan.dense_bytes
    beside = f" and {beside_bytes / 1e9:.1f} GB of slots, KV cache and workspace" if beside_bytes else ""
    check_free(
        weights_bytes + beside_bytes,
        "model",
        f"{spec.name} with {weights_bytes / 1e9:.1f} GB of {spec.dtype} weights{beside}",
    )
    if gpu:
        _check_gpu(plan)


def _check_gpu(plan: MemoryPlan) -> None:
    import torch

    with told_when_full():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    if plan.total_bytes > free_bytes:
        raise InputError(
            f"gpu-memory (or cache) must fit what is free of the GPU's memory ({free_bytes / 1e9:.2f} of "
            f"{total_bytes / 1e9:.2f} GB; another process may hold the rest), got {plan.told()}"
        )


@contextmanager
def told_when_full() -> Iterator[None]:
    """Turns a GPU that is out of memory into an :class:`InputError`, and lets go of what the failed work had taken."""
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        clear_frames(error.__traceback__)  # their variables hold tensors
        wanted = str(error).partition("Tried to allocate ")[2].partition(". ")[0] or "more"
        raise _full(wanted) from None


def is_full(error: RuntimeError) -> bool:
    """Whether it says that a GPU is out of memory: torch's allocator has a type of its own for that, while the CUDA
    driver, as it makes a context, and cuBLAS, which makes its handle later, only have words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL)


def give_back() -> None:
    """Gives the GPU's memory that nobody uses any longer back, which torch keeps for itself otherwise."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _full(wanted: str) -> InputError:
    import torch

    free = ""
    with suppress(RuntimeError, AssertionError):  # without a context nobody tells
        give_back()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        free = f" ({free_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB are free)"
    return InputError(
        f"gpu-memory (or cache) must be lower: the GPU must have room for {wanted}{free}, and another process may hold "
        "the rest, got out of memory"
    )


def begin_peak(device: torch.device) -> None:
    """From here on :func:`peak` counts."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> dict[str, int]:
    """The most memory that was taken, in bytes: of the process on the host since it began, of the GPU by torch.

    What is in use on the GPU beyond what torch reserves, now, is its context, and whatever other processes hold there.
    """
    taken = {"host_resident_bytes": _resident_bytes()}
    if device.type == "cuda":
        import torch

        taken["device_allocated_bytes"] = torch.cuda.max_memory_allocated()
        taken["device_reserved_bytes"] = torch.cuda.max_memory_reserved()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        taken["device_context_bytes"] = max(0, total_bytes - free_bytes - torch.cuda.memory_reserved())
    return taken


def _resident_bytes() -> int:
    """The most that this program has had in the host's memory; where the system tells no better, that of the program
    which started it counts too."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
