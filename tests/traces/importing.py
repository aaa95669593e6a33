"""Files of other tools' formats, small and written by hand, and what refuses their defects."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import InputError, Phase
from traces.importers import Options, import_files

PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)


def write(path: Path, text: str) -> Path:
    """Writes ``text``, gzipped when the name says so, and makes the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def expect(rule: str, name: str, *inputs: Path | str, **options: Any) -> None:
    """Importing gives one line that matches ``rule``."""
    with pytest.raises(InputError, match=rule) as raised:
        import_files(name, inputs, Options(**options))
    assert "\n" not in str(raised.value)


# gpt-oss-json


def gpt_oss(
    first: int = 7, tokens: int = 2, ids: Any = ((1, 0), (2, 3)), probs: Any = ((0.75, 0.25), (0.5, 0.5))
) -> dict[str, Any]:
    layers = {
        f"layer_{layer}": {"selected_experts": list(ids[layer]), "selected_probs": list(probs[layer])}
        for layer in range(len(ids))
    }
    rows = [{f"token_{first + token}": layers} for token in range(tokens)]
    return {"category": "c", "generated_only": ["a", "b", "c"], "router_data": rows}


# esft


def esft(folder: Path, lines: dict[int, list[str]]) -> Path:
    for layer, texts in lines.items():
        write(folder / f"expert_weights_{layer}.txt.gz", "".join(f"{text}\n" for text in texts))
    return folder


ESFT = {
    2: ["3\t2\t1\t0\t\t0.5\t0.25\t0.5\t0.125", "0\t1\t\t0.25\t0.5"],
    10: ["0\t3\t1\t2\t\t0.5\t0.5\t0.5\t0.5", "2\t3\t\t0.5\t0.5"],
    3: ["1\t0\t2\t3\t\t0.5\t0.5\t0.5\t0.5", "3\t0\t\t0.5\t0.5"],
}


def without(lines: dict[int, list[str]], *layers: int) -> dict[int, list[str]]:
    return {layer: texts for layer, texts in lines.items() if layer not in layers}


# router-trace-v2


def router_trace(**changed: Any) -> str:
    source = {
        "kind": "captured",
        "model": {"id": "m", "revision": "r"},
        "software": {"fooVersion": "1.2"},
        "workload": {"sha256": "abc"},
    }
    selections = [[[1], [0]], [[1], [2]], [[2], [2]]]
    sizes = {"version": 2, "tokens": 3, "layers": 2, "expertsPerLayer": 3, "topK": 1}
    return json.dumps(sizes | {"selections": selections, "source": source} | changed)


# route-csv

ROUTE = """\
# route_trace v1
# model=/home/someone/m.gguf arch=x n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=5
# layer=1 expert_bytes=100 dense_bytes=5
# layer=2 expert_bytes=300 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,1,0,3,0.75,0,100,0
0,0,0,1,1,1,0.25,0,100,0
0,0,1,1,0,2,0.5,0,100,0
0,0,1,1,1,3,0.5,0,0,0
0,0,1,2,0,0,0.5,0,300,0
0,0,1,2,1,1,0.5,1,0,0
0,1,2,1,0,1,0.5,1,0,0
0,1,2,1,1,0,0.5,0,100,0
0,1,2,2,0,3,0.5,0,300,0
0,1,2,2,1,1,0.5,2,0,0
1,1,9,1,0,1,0.5,1,0,0
1,1,9,1,1,2,0.5,0,100,0
1,1,9,2,0,3,0.5,0,300,0
1,1,9,2,1,0,0.5,2,0,0
# summary tokens=4
"""


def route(path: Path, *changes: tuple[str, str]) -> Path:
    text = ROUTE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return write(path / "run.csv", text)


# layer-csv

LAYER = """\
Layer ID,Batch Number,Token,Activated Expert IDs
1,0,"Hello, ","[3, 1]"
1,0,you,"[0, 2]"
1,1,.,"[2, 1]"
2,0,"Hello, ","[1, 0]"
2,0,you,"[2, 3]"
2,1,.,"[0, 3]"
"""


# logits-safetensors


def save(path: Path, values: Any, name: str = "c4", dtype: str = "F32") -> Path:
    """A safetensors file, byte by byte: its layout as JSON after its length, then one tensor."""
    array = np.array(values, dtype=np.float16 if dtype == "F16" else np.float32)
    raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else array.tobytes()
    layout = json.dumps({name: {"dtype": dtype, "shape": array.shape, "data_offsets": [0, len(raw)]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(layout).to_bytes(8, "little") + layout + raw)
    return path


def logits(folder: Path, dtype: str = "F32") -> Path:
    """Two layers, one sequence of two tokens, three experts; in the second token of layer 1 two experts are equal."""
    save(folder / "router_9.safetensors", [[[2, 1, 0], [0, 2, 1]]], dtype=dtype)
    save(folder / "router_10.safetensors", [[[0, 1, 2], [1, 0, 1]]], dtype=dtype)
    return folder
