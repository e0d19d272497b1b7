"""The networks of the experiments: residual ones with and without activations behind their sums, a ViT, a Marian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ResNet", "translator", "vision_transformer"]


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut around them (He et al., 2016).

    Args:
        before, after: channels.
        stride: of the first convolution; the shortcut is a 1 x 1 convolution where it or the channels change.
        post_sum: an activation behind the sum, as in the original.
    """

    def __init__(self, before: int, after: int, stride: int, *, post_sum: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.act2 = nn.ReLU() if post_sum else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """The block of x."""
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        return self.act2(y)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """The residual network for small images: a stem, three stages, mean, one linear layer.

    Args:
        depth: 6 n + 2 for n blocks in each stage.
        width: channels of the first stage; they double twice.
        classes: outputs.
        post_sum: activations behind the sums.
    """

    def __init__(self, depth: int, width: int, classes: int, *, post_sum: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        before = width
        for stage in range(3):
            for place in range((depth - 2) // 6):
                stride = 2 if stage and not place else 1
                blocks.append(Block(before, width * 2**stage, stride, post_sum=post_sum))
                before = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 1, H, W)."""
        y = self.blocks(self.stem(x)).mean((2, 3))
        return self.head(y)  # type: ignore[no-any-return]


def vision_transformer(size: int, classes: int) -> nn.Module:
    """A small ViT of timm: patches of 2 x 2, three blocks of width 32, FFNs of 128.

    Its matrices are drawn anew by the rule of Glorot and Bengio (2010): timm's deviation of 0.02 is made for widths of
    several hundred, and learns very slowly here.
    """
    from linearize.zoo import create

    shape: dict[str, Any] = {"img_size": size, "patch_size": 2, "in_chans": 1, "num_classes": classes}
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 4}
    model = create("timm:vit_tiny_patch16_224", **shape, **sizes, class_token=False, global_pool="avg")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def translator(vocabulary: int, pad: int, end: int, *, width: int = 64, layers: int = 2) -> nn.Module:
    """A small Marian model of transformers with random weights; its FFNs are four times as wide as its states."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        activation_function="relu",
        max_position_embeddings=64,
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
        dropout=0.0,
        scale_embedding=True,
        init_std=width**-0.5,
    )
    model: nn.Module = MarianMTModel(config)
    return model


def rewind_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Make batch norms forget what they have seen, and average evenly over what follows; returns them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    return norms


@torch.no_grad()
def settle_norms(model: nn.Module, batches: list[Tensor]) -> None:
    """Batch norms get the statistics of these batches: before training they know none, and in training they lag."""
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms = rewind_norms(model)
    if norms:
        model.train()
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
