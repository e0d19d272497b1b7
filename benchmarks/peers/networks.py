"""Small networks of timm for images of 28 x 28 pixels: a ViT, a ConvNeXt, a MobileNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["NETWORKS", "draw"]

CLASSES = 10


def vit() -> nn.Module:
    """A ViT: patches of 4 x 4, six blocks of width 64, FFNs of 256."""
    from linearize.zoo import create

    shape: dict[str, Any] = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES}
    sizes: dict[str, Any] = {"embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 4}
    return create("timm:vit_tiny_patch16_224", **shape, **sizes, class_token=False, global_pool="avg")


def convnext() -> nn.Module:
    """A ConvNeXt: seven blocks at 14 x 14, 7 x 7 and 3 x 3 pixels, 24 to 96 channels."""
    from linearize.zoo import create

    shape: dict[str, Any] = {"in_chans": 1, "num_classes": CLASSES, "patch_size": 2, "output_stride": 8}
    sizes: dict[str, Any] = {"depths": (2, 2, 2, 1), "dims": (24, 48, 96, 96), "ls_init_value": 0.1}
    return create("timm:convnext_atto", **shape, **sizes)


def mobilenet() -> nn.Module:
    """MobileNetV2's inverted residuals with ReLU6: six blocks at 14 x 14, 7 x 7 and 4 x 4 pixels, 16 to 40 channels."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s1_e6_c16"], ["ir_r2_k3_s2_e6_c24"], ["ir_r2_k3_s2_e6_c40"]]
    sizes: dict[str, Any] = {"stem_size": 16, "num_features": 160, "num_classes": CLASSES, "in_chans": 1}
    model: nn.Module = EfficientNet(decode_arch_def(blocks), act_layer=nn.ReLU6, **sizes)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "convnext": convnext, "mobilenet": mobilenet}


def draw(name: str, model: nn.Module) -> nn.Module:
    """Random weights by the network's own rules, but for a ViT's matrices: those by Glorot and Bengio (2010).

    timm's deviation of 0.02 is made for widths of several hundred, and learns slowly here.
    """
    if name == "vit":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model


def make(name: str, seed: int) -> nn.Module:
    """A network whose weights the seed decides."""
    torch.manual_seed(seed)
    return draw(name, NETWORKS[name]())
