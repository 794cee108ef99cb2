"""Vision transformers that are small enough to be trained here."""

import torch
from pydantic import Field
from torch import nn
from transformers import ViTConfig, ViTModel

from lora.config import Section
from lora.errors import ConfigError


class VitConfig(Section):
    """Shape of a vision transformer; the defaults reach 97 % on MNIST within minutes on one core."""

    side: int = Field(28, ge=4)
    """Height and width of the images, pixels."""
    channels: int = Field(1, ge=1)
    """Colour channels."""
    patch: int = Field(7, ge=1)
    """Height and width of a patch, pixels; divides `side`."""
    width: int = Field(64, ge=8)
    """Width of a token state."""
    depth: int = Field(6, ge=1)
    """Blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads; divides `width`."""
    inner: int = Field(128, ge=8)
    """Width inside a feed-forward network."""


def build_vit(config: VitConfig, *, seed: int) -> nn.Module:
    """Return a vision transformer with random weights drawn from `seed`; torch's generator is left as it was.

    Raises ConfigError where the patches do not fill the image, or the heads the width.
    """
    for name, whole, part in (("patch", config.side, config.patch), ("heads", config.width, config.heads)):
        if whole % part:
            raise ConfigError(f"vit.{name}={part} does not divide {whole}; choose a divisor")
    shape = ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.inner,
        image_size=config.side,
        patch_size=config.patch,
        num_channels=config.channels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ViTModel(shape, add_pooling_layer=False)
    return model
