"""Load a Mixture-of-Experts model: the one that ships, a local checkpoint, or random weights at given dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from real.models import families
from real.models.checkpoint import Checkpoint
from real.models.families import Family, MoeLayer
from real.models.names import SMALL_FOLDER, SMALL_NAME, checkpoint_folder, model_type_of, random_spec
from real.packing import fill_from, uniform_block
from real.quant import quantised_spec
from sim.spec import ModelSpec
from sim.spec.faults import first_fault
from traces.errors import InputError, unknown_name
from traces.memory import check_free

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HASHED_BYTES = 2**30
"""Weights up to this size are digested whole; of larger ones the files' names and sizes are."""
_LARGE = 2**20
"""Random matrices of more weights than these share theirs."""
_SPREAD = 0.02
"""The standard deviation of random weights, where a configuration has none."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what the project needs to know of it. ``layers`` are its MoE layers.

    Experts on the meta device are those of ``checkpoint``, or random ones where there is none. The experts are to be
    kept in ``quant`` (:data:`real.quant.QUANTS`), or as they are; ``spec`` counts their bytes so.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    spec: ModelSpec
    layers: list[MoeLayer]
    family: Family
    revision: str
    checkpoint: Checkpoint | None = None
    quant: str | None = None

    @property
    def has_random_experts(self) -> bool:
        """Whether the experts have no weights yet, and there is no checkpoint to read them from."""
        return self.checkpoint is None and any(weight.is_meta for weight in self.layers[0].experts.parameters())

    def experts(self, layer: MoeLayer) -> Iterator[Iterator[Tensor]]:
        """Every expert of a layer as its tensors, in the order of its form; each is read when it is taken."""
        place = next(name for name, module in self.model.named_modules() if module is layer.experts)
        names = {id(weight): name for name, weight in layer.experts.named_parameters(place)}
        return (self._tensors(layer, expert, names) for expert in range(self.spec.experts))

    def _tensors(self, layer: MoeLayer, expert: int, names: Mapping[int, str]) -> Iterator[Tensor]:
        for tensor in self.family.experts_tensors(layer.experts, expert):
            if not tensor.is_meta or self.checkpoint is None:
                yield tensor
            elif tensor._base is None:
                yield self.checkpoint.tensor(names[id(tensor)])
            else:
                yield self.checkpoint.expert(names[id(tensor._base)], expert)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def encoder_layers(self) -> int:
        """How many of the MoE layers, the first ones, are an encoder's."""
        return self.family.encoder_layers(self.config)

    def as_run(self, prompt: Sequence[int]) -> list[int]:
        """A prompt's tokens as they are run: an encoder-decoder's are followed by the one that begins its text."""
        if not self.config.is_encoder_decoder:
            return [*prompt]
        places = (self.model.generation_config, "decoder_start_token_id"), (self.config, "pad_token_id")
        named = [getattr(place, name, None) for place, name in places]
        return [*prompt, next((token for token in named if token is not None), 0)]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a sequence; empty when the model names none."""
        generation = self.model.generation_config
        ids = self.config.eos_token_id if generation is None else generation.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def load(
    name_or_path: str,
    *,
    dtype: str = "fp32",
    random_weights: bool = False,
    seed: int = 0,
    with_experts: bool = False,
    quant: str | None = None,
) -> LoadedModel:
    """Loads ``moetwin-small``, a local checkpoint folder, or (with ``random_weights``) a model of given dimensions.

    The routed experts stay on the meta device unless ``with_experts`` is given: :class:`real.store.HostStore` reads or
    generates them one by one, and keeps them in ``quant`` (``int8``, ``int4``) where that is given; modules never do.
    Random weights are seeded. Nothing is fetched from the network. Raises :class:`InputError` when the name is unknown,
    the folder is no checkpoint of a supported family, or a catalogue name or TOML file comes without
    ``random_weights``.
    """
    torch_dtype(dtype)
    if random_weights:
        return load_spec(random_spec(name_or_path), dtype=dtype, seed=seed, with_experts=with_experts, quant=quant)
    return _load_checkpoint(checkpoint_folder(name_or_path), dtype, with_experts, quant)


def dimensions(
    name_or_path: str, *, dtype: str = "fp32", random_weights: bool = False, quant: str | None = None
) -> ModelSpec:
    """The dimensions of what :func:`load` loads for the same arguments, without its weights; raises what it does."""
    torch_dtype(dtype)
    if random_weights:
        spec = random_spec(name_or_path)
        families.family_for(spec).config(spec)  # raises for a model that cannot be built
        return _kept(spec, dtype, quant)
    folder = checkpoint_folder(name_or_path)
    family = families.family(model_type_of(folder))
    with _as_input_error(folder), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return _kept(_spec_of(family, config, folder), dtype, quant)


def load_spec(
    spec: ModelSpec,
    *,
    dtype: str = "fp32",
    seed: int = 0,
    with_experts: bool = False,
    model_type: str | None = None,
    quant: str | None = None,
) -> LoadedModel:
    """Builds a model with the dimensions of ``spec`` and seeded random weights, in the family ``model_type``.

    Without ``with_experts`` the routed experts are on the meta device (no memory): whoever runs the model serves them.
    The other weights are the same either way. Raises :class:`InputError` when the family cannot have the dimensions.
    """
    family = families.family_for(spec) if model_type is None else families.family(model_type)
    config = family.config(spec)
    kept = _kept(spec, dtype, quant)
    _check_host_memory(spec.in_dtype(dtype) if with_experts else kept)
    with quiet():
        model = _on_meta(family, config, dtype)
    layers = family.moe_layers(model)
    _fill(model, [layer.experts for layer in layers], seed, with_experts)
    return replace(_finish(model, None, kept, family, f"random-{seed}"), quant=quant)


def _kept(spec: ModelSpec, dtype: str, quant: str | None) -> ModelSpec:
    """The dimensions with all weights in ``dtype``, but the experts in ``quant``; raises :class:`InputError`."""
    torch_dtype(dtype)
    return spec.in_dtype(dtype) if quant is None else quantised_spec(spec.in_dtype(dtype), quant)


def _check_host_memory(spec: ModelSpec) -> None:
    """Raises :class:`InputError` when all weights of ``spec`` together exceed the host's free memory."""
    needed = spec.dense_bytes + spec.moe_layers * spec.experts * spec.expert_bytes
    check_free(needed, "model", f"{spec.name} with {needed / 1e9:.1f} GB of {spec.dtype} weights")


def _name_of(folder: Path) -> str:
    return SMALL_NAME if folder == SMALL_FOLDER else folder.resolve().name


def _spec_of(family: Family, config: PretrainedConfig, folder: Path) -> ModelSpec:
    """The dimensions of a checkpoint; raises :class:`InputError`, naming the file, for those that no model has."""
    file = folder / "config.json"
    try:
        return family.spec(config, _name_of(folder))
    except ValidationError as error:
        raise InputError(f"{file}: {first_fault(error)}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{file} must have the dimensions of a {family.model_type} model, got: {error}") from error


def _load_checkpoint(folder: Path, dtype: str, with_experts: bool, quant: str | None) -> LoadedModel:
    family = families.family(model_type_of(folder))
    with _as_input_error(folder), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    own = _spec_of(family, config, folder)
    spec = _kept(own, dtype, quant)
    _check_host_memory(own.in_dtype(dtype) if with_experts else spec)
    with _as_input_error(folder), quiet():
        model = _on_meta(family, config, dtype)
        has_tokenizer = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    checkpoint = Checkpoint(folder, model)
    experts = [layer.experts for layer in family.moe_layers(model)]
    _read(model, checkpoint, [] if with_experts else experts, torch_dtype(dtype))
    return replace(_finish(model, tokenizer, spec, family, _revision(folder)), checkpoint=checkpoint, quant=quant)


def _on_meta(family: Family, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return family.build(config, torch_dtype(dtype))


def _read(model: PreTrainedModel, checkpoint: Checkpoint, left: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Gives a model on the meta device its weights, but for those of the modules ``left``; one copy of each is made."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()  # fills the buffers that are in no file; nothing happens to what is on the meta device
    kept = {id(weight) for module in left for weight in module.parameters()}
    exact = model._get_dtype_plan(dtype)
    with closing(checkpoint):
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in checkpoint.names and id(tensor) not in kept:
                as_dtype = next((exact[part] for part in exact if part in name), tensor.dtype)
                _put(model, name, torch.empty(tensor.shape, dtype=as_dtype).copy_(checkpoint.tensor(name)))
    model.tie_weights(missing_keys=set(model.state_dict()) - checkpoint.names, recompute_mapping=False)


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


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
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                sha.update(chunk)
    return sha.hexdigest()


def _fill(model: PreTrainedModel, experts: list[nn.Module], seed: int, with_experts: bool) -> None:
    """Allocates the meta model on the CPU and initialises it; the experts come last so that they change no other.

    Matrices of more than a million weights are filled with windows of one block, as drawing each would take minutes.
    """
    left = {id(module) for one in experts for module in one.modules()}
    for module in model.modules():
        if id(module) not in left:
            module.to_empty(device="cpu", recurse=False)
    model.tie_weights()
    spread = getattr(model.config, "initializer_range", _SPREAD)
    _fill_large([weight for weight in model.parameters() if not weight.is_meta], spread, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.initialize_weights()
        for module in experts if with_experts else []:
            module.to_empty(device="cpu")
            for weight in module.parameters():
                weight.normal_(std=spread)


def _fill_large(weights: Iterable[nn.Parameter], spread: float, seed: int) -> None:
    """Fills the large matrices with numbers of standard deviation ``spread``, and marks them as initialised."""
    large = [weight for weight in weights if weight.ndim > 1 and weight.numel() > _LARGE]
    if not large:
        return
    block = uniform_block(8 * _LARGE, large[0].dtype, 3**0.5 * spread, seed)
    with torch.no_grad():
        for number, weight in enumerate(large):
            fill_from(block, number * len(block) // len(large), weight.view(-1))
            weight._is_hf_initialized = True  # type: ignore[attr-defined]


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
