"""Which matrices of a base model are adapted: by module names, or `attention`, `ffn`, `all`."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.errors import ModelError, nearest
from lora.frame import Site

GROUPS = ("attention", "ffn", "all")


def find_sites(model: nn.Module, targets: str | Sequence[str]) -> tuple[Site, ...]:
    """Return the sites that `targets` names, in the model's own order.

    A group counts the linear layers (nn.Linear, Conv1D) inside the numbered blocks of the model: those below a module
    called *attention* or *attn* are `attention`, the others `ffn`. A name means every linear layer whose path is the
    name or ends in it, as in PEFT. A list may hold both. Raises ModelError for an empty list, and for a group or a name
    that nothing carries.
    """
    layers = dict(_linear_layers(model))
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted:
        raise ModelError(f"adapter.targets=[]: nothing would be adapted; known: {', '.join(GROUPS)}, {_listed(layers)}")
    for target in wanted:
        if not any(_means(target, name) for name in layers):
            raise ModelError(_nothing_found(target, layers))
    names = [name for name in layers if any(_means(target, name) for target in wanted)]
    return tuple(Site(name, *_widths(layers[name])) for name in names)


def _means(target: str, name: str) -> bool:
    if target in GROUPS:
        return _in_block(name) and target in ("all", _role(name))
    return _matches(name, target)


def _nothing_found(target: str, layers: dict[str, nn.Module]) -> str:
    if target in GROUPS:
        return f"adapter.targets={target}: the model has no such linear layers; known: {_listed(layers)}"
    return f"adapter.targets: no linear layer is called '{target}'{nearest(target, {*_leaves(layers), *GROUPS})}"


def short_names(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Return the shortest `target_modules` for PEFT that name exactly these sites: last components, else full paths."""
    chosen = {site.name for site in sites}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    named = {name for name, _ in model.named_modules() if any(_matches(name, leaf) for leaf in leaves)}
    return leaves if named == chosen else sorted(chosen)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    d_in, d_out = layer.weight.shape  # type: ignore[misc]
    return int(d_in), int(d_out)


def _in_block(name: str) -> bool:
    return any(piece.isdigit() for piece in name.split("."))


def _role(name: str) -> str:
    return "attention" if any("attn" in piece or "attention" in piece for piece in name.split(".")) else "ffn"


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _leaves(layers: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def _listed(layers: dict[str, nn.Module]) -> str:
    return ", ".join(_leaves(layers)) or "none (it has no nn.Linear or Conv1D)"
