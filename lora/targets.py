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
    name or ends in it, as in PEFT. Raises ModelError for a name that nothing carries.
    """
    layers = dict(_linear_layers(model))
    if isinstance(targets, str) and targets in GROUPS:
        names = [name for name in layers if _in_block(name) and targets in ("all", _role(name))]
        if not names:
            raise ModelError(
                f"adapter.targets={targets}: the model has no such linear layers; known: {_leaves(layers)}"
            )
    else:
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        for target in wanted:
            if not any(_matches(name, target) for name in layers):
                known = {*_leaves(layers), *GROUPS}
                raise ModelError(f"adapter.targets: no linear layer is called '{target}'{nearest(target, known)}")
        names = [name for name in layers if any(_matches(name, target) for target in wanted)]
    return tuple(Site(name, *_widths(layers[name])) for name in names)


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
