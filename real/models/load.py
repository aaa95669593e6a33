"""Load a Mixture-of-Experts model: the one that ships, a local checkpoint, or random weights at given dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from real.models import families
from real.models.families import Family, MoeLayer
from real.models.names import SMALL_FOLDER, SMALL_NAME, checkpoint_folder, model_type_of, random_spec
from sim.spec import ModelSpec
from traces.errors import InputError, unknown_name
from traces.memory import check_free

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HASHED_BYTES = 2**30
"""Weights up to this size are digested whole; of larger ones the files' names and sizes are."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what the project needs to know of it. ``layers`` are its MoE layers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    spec: ModelSpec
    layers: list[MoeLayer]
    family: Family
    revision: str

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a sequence; empty when the model names none."""
        generation = self.model.generation_config
        ids = self.config.eos_token_id if generation is None else generation.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def load(
    name_or_path: str, *, dtype: str = "fp32", random_weights: bool = False, seed: int = 0, with_experts: bool = False
) -> LoadedModel:
    """Loads ``moetwin-small``, a local checkpoint folder, or (with ``random_weights``) a model of given dimensions.

    Random weights are seeded; their routed experts stay on the meta device unless ``with_experts`` is given. Nothing
    is fetched from the network. Raises :class:`InputError` when the name is unknown, the folder is no checkpoint of a
    supported family, or a catalogue name or TOML file comes without ``random_weights``.
    """
    torch_dtype(dtype)
    if random_weights:
        return load_spec(random_spec(name_or_path), dtype=dtype, seed=seed, with_experts=with_experts)
    return _load_checkpoint(checkpoint_folder(name_or_path), dtype)


def dimensions(name_or_path: str, *, dtype: str = "fp32", random_weights: bool = False) -> ModelSpec:
    """The dimensions of what :func:`load` loads for the same arguments, without its weights; raises what it does."""
    torch_dtype(dtype)
    if random_weights:
        return random_spec(name_or_path).in_dtype(dtype)
    folder = checkpoint_folder(name_or_path)
    family = families.family(model_type_of(folder))
    with _as_input_error(folder), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return family.spec(config, _name_of(folder)).in_dtype(dtype)


def load_spec(
    spec: ModelSpec, *, dtype: str = "fp32", seed: int = 0, with_experts: bool = False, model_type: str | None = None
) -> LoadedModel:
    """Builds a model with the dimensions of ``spec`` and seeded random weights, in the family ``model_type``.

    Without ``with_experts`` the routed experts are on the meta device (no memory): whoever runs the model serves them.
    The other weights are the same either way. Raises :class:`InputError` when the family cannot have the dimensions.
    """
    family = families.family_for(spec) if model_type is None else families.family(model_type)
    config = family.config(spec)
    _check_host_memory(spec.in_dtype(dtype) if dtype in DTYPES else spec)
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation="sdpa")
    layers = family.moe_layers(model)
    _fill(model, [layer.experts for layer in layers], seed, with_experts)
    return _finish(model, None, spec.in_dtype(dtype), family, f"random-{seed}")


def _check_host_memory(spec: ModelSpec) -> None:
    """Raises :class:`InputError` when all weights of ``spec`` together exceed the host's free memory."""
    needed = spec.dense_bytes + spec.moe_layers * spec.experts * spec.expert_bytes
    check_free(needed, "model", f"{spec.name} with {needed / 1e9:.1f} GB of {spec.dtype} weights")


def _name_of(folder: Path) -> str:
    return SMALL_NAME if folder == SMALL_FOLDER else folder.resolve().name


def _load_checkpoint(folder: Path, dtype: str) -> LoadedModel:
    family = families.family(model_type_of(folder))
    with _as_input_error(folder), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype(dtype),
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        has_tokenizer = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    model, info = loaded
    if info["missing_keys"]:
        raise InputError(f"{folder} must hold every weight of the model, got none for {min(info['missing_keys'])}")
    spec = family.spec(model.config, _name_of(folder)).in_dtype(dtype)
    return _finish(model, tokenizer, spec, family, _revision(folder))


@contextmanager
def _as_input_error(folder: Path) -> Iterator[None]:
    """Tells what transformers finds wrong with a checkpoint as a mistake in the input.

    Transformers passes on the errors of the libraries that it reads and validates with, and some of these derive from
    nothing but Exception. Too little memory is not the checkpoint's fault.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        raise InputError(f"{folder} must be a checkpoint that transformers can load, got: {reason}") from error


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: ModelSpec,
    family: Family,
    revision: str,
) -> LoadedModel:
    model.eval()
    model.requires_grad_(False)
    model.set_experts_implementation("eager")
    return LoadedModel(model, tokenizer, spec, family.moe_layers(model), family, revision)


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype called ``fp32``, ``bf16`` or ``fp16``; raises :class:`InputError` for another name."""
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _revision(folder: Path) -> str:
    """SHA-256 of the weights: of the file when there is one, else of all of them in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) > _HASHED_BYTES:
        sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
        return "sizes-" + hashlib.sha256(sizes.encode()).hexdigest()
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _fill(model: PreTrainedModel, experts: list[nn.Module], seed: int, with_experts: bool) -> None:
    """Allocates the meta model on the CPU and initialises it; the experts come last so that they change no other."""
    for module in model.modules():
        if not any(module is one for one in experts):
            module.to_empty(device="cpu", recurse=False)
    model.tie_weights()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.initialize_weights()
        for module in experts if with_experts else []:
            module.to_empty(device="cpu")
            for weight in module.parameters():
                weight.normal_(std=model.config.initializer_range)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the log and the progress bars of transformers, and restores both."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
