"""The weights of a checkpoint under the names of the model, read whole or an expert at a time.

The hub's files hold an expert's matrices one by one, transformers' modules hold all experts of a layer in one. Which
name becomes which, and how parts are put together, is transformers' own table of conversions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from real.models.shards import Shards
from traces.errors import InputError

Shape = tuple[int, ...]
Convert = Callable[[dict[str, list[Tensor]]], Tensor]
"""Puts the tensors of files, by pattern, together to one of the model."""


@dataclass
class _Recipe:
    """How a tensor of the model is made: from the keys of each pattern, by the number of the expert they belong to.

    Keys without such a number have all experts in them, and are kept under None.
    """

    patterns: list[str]
    convert: Convert
    keys: dict[str, dict[int | None, str]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def by_expert(self) -> bool:
        return any(None not in keys for keys in self.keys.values())

    def whole(self, files: Shards) -> Tensor:
        """The tensor."""
        ordered = {pattern: sorted(keys.items(), key=lambda one: one[0] or 0) for pattern, keys in self.keys.items()}
        return self.convert({pattern: [files.read(key) for _, key in keys] for pattern, keys in ordered.items()})

    def part(self, files: Shards, expert: int) -> Tensor:
        """What the tensor has of one expert."""
        if self.by_expert:
            parts = {pattern: [files.read(keys[expert])] for pattern, keys in self.keys.items()}
        else:
            parts = {pattern: [files.read(keys[None], expert)] for pattern, keys in self.keys.items()}
        return self.convert(parts)[0]


class Checkpoint:
    """A checkpoint's tensors under the names of ``model``, whose parameters may be on the meta device."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Looks at headers alone; raises :class:`InputError` when files and model do not fit each other."""
        self.folder, self._packed = folder, _is_mxfp4(model, folder)
        self._files = Shards.of(folder)
        self._wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._recipes: dict[str, _Recipe] = {}
        self._sort(model)
        self._check_names(model)
        for name in self._recipes:
            self._check_shapes(name)

    @property
    def names(self) -> frozenset[str]:
        """The names of the model's tensors that are in the files."""
        return frozenset(self._recipes)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor of the model, in the dtype of the file."""
        return self._recipes[name].whole(self._files)

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's part of a tensor of the model, in the dtype of the file."""
        return self._recipes[name].part(self._files, expert)

    def close(self) -> None:
        """Closes the files; the next reading opens them again."""
        self._files.close()

    def _sort(self, model: PreTrainedModel) -> None:
        """Finds the tensor of the model that each key of the files belongs to; raises for one that has none."""
        conversions = get_model_conversion_mapping(model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix, state = model.base_model_prefix, model.state_dict()
        for key, entry in self._files.entries.items():
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in self._wanted and key in self._wanted:
                name, pattern = key, None
            stem, _, part = name.rpartition("_")
            if self._packed and part in ("blocks", "scales") and stem in self._wanted:
                recipe = self._recipes.setdefault(stem, _Recipe(["blocks", "scales"], _unpacked))
                recipe.keys[part][None] = key
            elif name not in self._wanted:
                if not _ignored(model, key):
                    raise InputError(f"{entry.file} must hold tensors of the model alone, got {key}, which it has not")
            elif pattern is None:
                self._recipes.setdefault(name, _Recipe([""], _as_it_is)).keys[""][None] = key
            else:
                converter = by_pattern[pattern]
                whole = _Recipe(list(converter.source_patterns), partial(_converted, converter, model, name))
                self._recipes.setdefault(name, whole).keys[pattern][_expert_in(key, pattern)] = key

    def _check_names(self, model: PreTrainedModel) -> None:
        """Raises :class:`InputError` for a tensor of the model, or an expert of it, that no file holds."""
        tied = dict(model.all_tied_weights_keys)
        same = {**tied, **{source: target for target, source in tied.items()}}
        optional = model._keys_to_ignore_on_load_missing or ()
        for name, shape in self._wanted.items():
            if name not in self._recipes:
                if same.get(name) in self._recipes or any(re.search(one, name) for one in optional):
                    continue
                raise self._missing(name)
            recipe = self._recipes[name]
            for pattern in recipe.patterns:
                if pattern not in recipe.keys:
                    raise self._missing(f"{pattern.lstrip('.')} of {name}")
                if recipe.by_expert:
                    self._check_experts(recipe.keys[pattern], shape[0])

    def _check_experts(self, keys: Mapping[int | None, str], experts: int) -> None:
        """Raises for an expert that is missing, or that is one too many."""
        for number, key in keys.items():
            if number is None or number >= experts:
                raise InputError(f"{self._files.entries[key].file} must hold {experts} experts a layer, got {key}")
        for number in range(experts):
            if number not in keys:
                known, like = next(iter(keys.items()))
                head, _, tail = like.rpartition(f".{known}.")
                raise self._missing(f"{head}.{number}.{tail}")

    def _missing(self, name: str) -> InputError:
        return InputError(f"{self.folder} must hold every weight of the model, got none for {name}")

    def _check_shapes(self, name: str) -> None:
        """Raises :class:`InputError` for a tensor whose parts, put together as meta tensors, have a wrong shape."""
        wanted, recipe = self._wanted[name], self._recipes[name]
        experts = range(wanted[0]) if recipe.by_expert else [None]
        good: set[tuple[Shape, ...]] = set()
        for expert in experts:
            keys = [keys[expert] for keys in recipe.keys.values()]
            shapes = tuple(self._files.entries[key].shape for key in keys)
            if shapes not in good:
                self._check_parts(name, keys, wanted if expert is None else (1, *wanted[1:]))
                good.add(shapes)

    def _check_parts(self, name: str, keys: list[str], wanted: Shape) -> None:
        recipe, entries = self._recipes[name], self._files.entries
        dtype = torch.uint8 if recipe.convert is _unpacked else torch.float32
        try:
            parts = {
                pattern: [torch.empty(entries[key].shape, dtype=dtype, device="meta")]
                for pattern, key in zip(recipe.keys, keys, strict=True)
            }
            shape: object = tuple(recipe.convert(parts).shape)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            shape = None
        if shape != wanted:
            told = ", ".join(f"{key} {list(entries[key].shape)}" for key in keys)
            file = entries[keys[0]].file
            raise InputError(f"{file} must hold {name} of shape {list(wanted)}, got {told}")


def _is_mxfp4(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the experts are packed in MXFP4; raises :class:`InputError` for other quantised weights."""
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is None:
        return False
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    if str(getattr(method, "value", method)) != "mxfp4":
        raise InputError(
            f"{folder}: quantization_config must be that of MXFP4 or be left out, got quant_method {method!r}"
        )
    return True


def _ignored(model: PreTrainedModel, key: str) -> bool:
    """Whether transformers leaves out this key too: parts that the model has no use for, and buffers of old files."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return any(re.search(pattern, key) for pattern in patterns)


def _expert_in(key: str, pattern: str) -> int | None:
    """The last number in a key whose pattern has a place for one."""
    numbers = re.findall(r"\.(\d+)(?=\.)", key) if "*" in pattern else []
    return int(numbers[-1]) if numbers else None


def _as_it_is(tensors: dict[str, list[Tensor]]) -> Tensor:
    return tensors[""][0]


def _unpacked(tensors: dict[str, list[Tensor]]) -> Tensor:
    """MXFP4 blocks and scales in bf16: the layout of the model, with all experts of the parts."""
    return convert_moe_packed_tensors(tensors["blocks"][0], tensors["scales"][0])


def _converted(
    converter: WeightConverter, model: PreTrainedModel, name: str, tensors: dict[str, list[Tensor]]
) -> Tensor:
    """What the operations of a converter make of the parts."""
    values: dict[str, Any] = tensors
    for operation in converter.operations:
        values = operation.convert(
            values,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
        )
    (value,) = values.values()
    return value[0] if isinstance(value, list) else value
