"""What a machine has, for the suite of the GPU: prints facts and faults as JSON.

python3 -m benchmarks.gpu_probe cuda olmoe-1b-7b qwen3-30b-a3b
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from real.calibrate import describe_machine
from sim.spec import catalogue
from traces.memory import free_bytes

DEVICE_ROOM = 0.8
"""The share of a model's weights that the largest cache, 75 % of the experts, and the rest take on the GPU."""
HOST_ROOM_BYTES = 6 * 10**9
"""What the program itself, CUDA and packed results take on the host beside the weights."""


def probe(device: str, models: Sequence[str]) -> dict[str, Any]:
    """Facts by name, and under ``faults`` what is missing for ``models`` in the dtype that the device is given."""
    dtype = "bf16" if device == "cuda" else "fp32"
    weights = {name: _weights_bytes(name, dtype) for name in models}
    host = free_bytes()
    facts: dict[str, Any] = {
        "machine": ", ".join(f"{name} {value}" for name, value in describe_machine().items()),
        "host memory": f"{host / 1e9:.0f} GB free, {platform.machine()}",
        "weights": ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in weights.items()),
    }
    faults = [
        f"host memory must hold {name}, {(size + HOST_ROOM_BYTES) / 1e9:.0f} GB, got {host / 1e9:.0f} GB free"
        for name, size in weights.items()
        if size + HOST_ROOM_BYTES > host
    ]
    try:
        import numba  # noqa: F401 - whether it can be imported depends on the version of numpy
    except ImportError as error:
        facts["numba"] = f"cannot be used, and fitted systems run with their stand-ins ({error})"
    if device == "cuda":
        faults += _gpu(facts, weights)
    return {**facts, "faults": faults}


def _gpu(facts: dict[str, Any], weights: dict[str, int]) -> list[str]:
    if not torch.cuda.is_available():
        return [f"a CUDA device: torch {torch.__version__} finds none"]
    free, total = torch.cuda.mem_get_info()
    facts["GPU"] = f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    facts["CUDA"] = f"{torch.version.cuda}, torch {torch.__version__}, transformers {transformers.__version__}"
    return [
        f"GPU memory must hold 75% of {name}, {DEVICE_ROOM * size / 1e9:.0f} GB, got {free / 1e9:.1f} GB free"
        for name, size in weights.items()
        if DEVICE_ROOM * size > free
    ]


def _weights_bytes(name: str, dtype: str) -> int:
    spec = catalogue.model(name).in_dtype(dtype)
    return spec.dense_bytes + spec.moe_layers * spec.experts * spec.expert_bytes


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], sys.argv[2:])))
