"""Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, loadable by everybody."""

import glob
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora.errors import ModelError
from lora.frame import Frame, Site
from lora.model import AdaptedModel, Blocks
from lora.targets import find_sites, short_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STEM = "base_model.model."


def export_adapter(
    adapted: AdaptedModel,
    blocks: Blocks,
    directory: Path,
    *,
    reference: str,
    task_type: str | None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write one slot (`blocks`: B, and A where it trained) as a PEFT directory, aside and renamed.

    One rank and one alpha hold for all matrices, because servers drop per-module patterns silently; the rank is that
    of the blocks, which may be a multiple of the frame's (adapters beside one another), at an equal scale. `extra` adds
    further files by name. An existing directory is replaced as a whole: after a kill at any instant `directory` holds
    all of the old files, or all of the new ones, or is not there and its old files are at `.NAME.PID.old` beside it,
    until the next export.
    """
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    old = aside.with_name(f"{aside.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(_tensors(adapted, blocks), aside / WEIGHTS, metadata={"format": "pt"})
    (aside / CONFIG).write_text(json.dumps(_config(adapted, blocks, reference, task_type), indent=2) + "\n")
    for name, data in (extra or {}).items():
        (aside / name).write_bytes(data)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    aside.rename(directory)
    for leftover in directory.parent.glob(f".{glob.escape(directory.name)}.*.old"):
        shutil.rmtree(leftover, ignore_errors=True)
    return directory


def _tensors(adapted: AdaptedModel, blocks: Blocks) -> dict[str, Tensor]:
    tensors = {}
    for site in adapted.sites:
        a = blocks.get(("A", site.name), adapted.frame.matrices[site.name])
        tensors[f"{_STEM}{site.name}.lora_A.weight"] = a.detach().float().cpu().clone()
        tensors[f"{_STEM}{site.name}.lora_B.weight"] = blocks["B", site.name].detach().float().cpu().clone()
    return tensors


def _config(adapted: AdaptedModel, blocks: Blocks, reference: str, task_type: str | None) -> dict[str, Any]:
    rank = blocks["B", adapted.sites[0].name].shape[-1]
    kinds = {isinstance(layer.base, Conv1D) for layer in adapted.layers.values()}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": reference,
        "r": rank,
        "lora_alpha": adapted.alpha * rank / adapted.frame.rank,
        "lora_dropout": 0.0,
        "target_modules": short_names(adapted.base, adapted.sites),
        "bias": "none",
        "fan_in_fan_out": kinds == {True},
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


@dataclass(frozen=True)
class ImportedAdapter:
    """A PEFT adapter: its A's as a frame, its B's `[d_out, r]` by module path, and its alpha."""

    frame: Frame
    b: Mapping[str, Tensor]
    alpha: float

    def attach(self, base: nn.Module) -> tuple[AdaptedModel, Blocks]:
        """Attach the adapter to its base model; returns the model and the blocks to bind."""
        layers = dict(base.named_modules())
        unknown = [name for name in self.b if name not in layers]
        if unknown:
            raise ModelError(f"the adapter names '{unknown[0]}', which the base model lacks; load it on its own base")
        sites = tuple(site for site in find_sites(base, tuple(self.b)) if site.name in self.b)
        for site in sites:
            _check_shapes(site, self.frame.matrices[site.name], self.b[site.name], rank=self.frame.rank)
        adapted = AdaptedModel(base, sites, self.frame, alpha=self.alpha)
        return adapted, {("B", site.name): self.b[site.name] for site in sites}


def import_adapter(directory: Path) -> ImportedAdapter:
    """Read a PEFT LoRA directory. Raises ModelError for what one frame with one scale cannot express."""
    config, tensors = _read(directory)
    _refuse_variants(directory, config)
    a, b = _factors(directory, tensors)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{directory / CONFIG}: r and lora_alpha must be numbers ({error})") from error
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return ImportedAdapter(Frame(a, rank), b, alpha=scale * rank)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: no {name}; give a PEFT LoRA directory")
    try:
        config = json.loads((directory / CONFIG).read_text())
        tensors = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"{directory}: the files are damaged ({error}); write the adapter again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{directory / CONFIG}: not a JSON object; write the adapter again")
    return config, tensors


def _factors(directory: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the file's tensors into A's and B's by module path."""
    a, b = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_STEM)
        if name.endswith(".lora_A.weight"):
            a[name.removesuffix(".lora_A.weight")] = tensor.to(torch.float32)
        elif name.endswith(".lora_B.weight"):
            b[name.removesuffix(".lora_B.weight")] = tensor.to(torch.float32)
        else:
            raise ModelError(f"{directory}: tensor '{key}' is neither lora_A nor lora_B; only plain LoRA is read")
    if a.keys() != b.keys() or not a:
        raise ModelError(f"{directory}: {len(a)} lora_A and {len(b)} lora_B tensors do not pair up")
    return a, b


def _check_shapes(site: Site, a: Tensor, b: Tensor, *, rank: int) -> None:
    for factor, tensor, expected in (("lora_A", a, (rank, site.d_in)), ("lora_B", b, (site.d_out, rank))):
        if tuple(tensor.shape) != expected:
            raise ModelError(
                f"{factor} of '{site.name}' has shape {tuple(tensor.shape)}, the base model and r={rank} need "
                f"{expected}; load the adapter on its own base"
            )


_VARIANTS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it is; the others adapt a base from which a first guess was subtracted."""


def _refuse_variants(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: peft_type={config.get('peft_type')}; only LORA is read")
    for key in _VARIANTS:
        if config.get(key):
            raise ModelError(f"{directory}: {key}={config[key]} is not supported; merge it or retrain without it")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{directory}: bias={config['bias']} is not supported; only bias=none")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise ModelError(
            f"{directory}: init_lora_weights={config['init_lora_weights']} changes the base model; save the adapter "
            "with path_initial_model_for_weight_conversion to make a plain one of it"
        )
