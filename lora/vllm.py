"""What vLLM takes of a PEFT directory, and what it would drop without a word."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora.errors import ModelError
from lora.peft_files import CONFIG, WEIGHTS

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as --max-lora-rank; an adapter may have any rank up to it."""
_READ = ("r", "lora_alpha", "target_modules")
_MODULES = r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
_TENSOR = re.compile(rf"base_model\.model\.model\.layers\.\d+\.{_MODULES}\.lora_([AB])\.weight")
_DTYPES = ("F32", "F16", "BF16")
_REFUSED = {"use_dora": "vLLM refuses it", "modules_to_save": "vLLM refuses it, or reads a classifier's head only"}
_DROPPED = (
    "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "target_parameters", "fan_in_fan_out",
    "alora_invocation_tokens", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
"""Keys that change what an adapter computes and that vLLM does not read."""


@dataclass(frozen=True)
class VllmAdapter:
    """A PEFT directory that vLLM serves as it is: its rank, and the base model that it names."""

    rank: int
    base: str

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank that takes it."""
        return next(rank for rank in RANKS if rank >= self.rank)

    def command(self, name: str, directory: Path) -> str:
        """Return the command that serves it."""
        return (
            f"vllm serve {self.base} --enable-lora --max-lora-rank {self.max_lora_rank} "
            f"--lora-modules {name}={directory}"
        )


def check_for_vllm(directory: Path) -> VllmAdapter:
    """Return what vLLM is told of an adapter. Raises ModelError, with the key or tensor, for what it would not serve.

    Decoders with the layers of Llama (Llama, Mistral, Qwen) are taken. Source: `peft_helper.py` and `lora_model.py` of
    vLLM, as of 2026.

    | case | what vLLM does with it | here |
    |---|---|---|
    | an encoder, or a module of another name | refuses it when the adapter is loaded | ModelError |
    | a module's name with another beginning | answers from the base model | ModelError |
    | bias, DoRA, saved modules, a rank above 512 | refuses it when the adapter is loaded | ModelError |
    | patterns of ranks or alphas, and other keys that it does not read | answers at a wrong scale | ModelError |
    """
    config = _config(directory)
    rank = _checked(config)
    tensors = _shapes(directory)
    for name in sorted(tensors):
        _check_tensor(name, tensors, rank=rank)
    return VllmAdapter(rank, str(config.get("base_model_name_or_path") or "BASE"))


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: no {CONFIG} that can be read; give a PEFT LoRA directory") from error
    if not isinstance(config, dict) or any(config.get(key) is None for key in _READ):
        raise ModelError(f"{directory / CONFIG}: vLLM needs {', '.join(_READ)}; write the adapter again")
    return config


def _checked(config: Mapping[str, Any]) -> int:
    """Check the configuration, and return the rank."""
    if config.get("task_type") != "CAUSAL_LM":
        raise ModelError(
            f"task_type={config.get('task_type')}: vLLM serves adapters of decoders only; serve this one with "
            "`lethe serve`"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"bias={config['bias']}: vLLM refuses it; train with bias=none")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"{key}={config[key]}: {why}; train without it")
    for key in _DROPPED:
        if config.get(key):
            raise ModelError(f"{key}={config[key]}: vLLM drops it and answers otherwise; train without it")
    rank = config["r"]
    if not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
        raise ModelError(f"r={rank}: vLLM takes ranks from 1 to {RANKS[-1]}; train with one of them")
    return rank


def _shapes(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return every tensor's kind of number and shape, without reading its numbers."""
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            found = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: no {WEIGHTS} that can be read; give a PEFT LoRA directory") from error
    if not found:
        raise ModelError(f"{directory / WEIGHTS} holds no tensor; write the adapter again")
    return found


def _check_tensor(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, rank: int) -> None:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ModelError(
            f"tensor '{name}': vLLM knows no such module of a decoder with Llama's layers and would answer from the "
            "base model; adapt q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj"
        )
    factor = match[1]
    other = f"{name[: match.start(1)]}{'B' if factor == 'A' else 'A'}.weight"
    if other not in tensors:
        raise ModelError(f"tensor '{name}' comes without '{other}'; write the adapter again")
    kind, shape = tensors[name]
    if len(shape) != 2 or shape[0 if factor == "A" else 1] != rank:
        raise ModelError(f"tensor '{name}' has shape {shape}, which is not of rank {rank}; write the adapter again")
    if kind not in _DTYPES:
        raise ModelError(f"tensor '{name}' is of {kind}; vLLM takes {', '.join(_DTYPES)}, so write it as one of these")
