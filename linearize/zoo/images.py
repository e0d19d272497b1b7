"""What an image model takes: size, channels, normalisation, and the names of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linearize.errors import CaptureError, UsageError

__all__ = ["ImageFormat", "image_format"]


@dataclass(frozen=True)
class ImageFormat:
    """The images of a model.

    Attributes:
        channels, size: shape of an image; size is (height, width).
        mean, std: normalisation per channel, for values in [0, 1].
        keywords: names of the images and of the labels in its forward; None for one positional argument.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    keywords: tuple[str, str] | None = None


def image_format(model: nn.Module) -> ImageFormat:
    """The format of the images that a model of timm or transformers takes.

    Raises:
        UsageError: the model is of neither library, or takes something else than images.

    Examples:
        >>> from linearize.zoo import create
        >>> image_format(create("timm:test_vit", img_size=32, in_chans=1)).size
        (32, 32)
    """
    from linearize.zoo import example_inputs

    try:
        args, kwargs = example_inputs(model, batch=1)
    except CaptureError as error:
        raise UsageError(error.where, error.found, "Use the functions of linearize from Python.") from error
    images = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(images, Tensor) or images.ndim != 4 or set(kwargs) - {"pixel_values", "use_cache"}:
        found = f"found a model that takes {', '.join(kwargs) or 'no images'}, but the data are images"
        raise UsageError(type(model).__name__, found, "Use the functions of linearize from Python.")
    channels, height, width = images.shape[1:]
    if kwargs:
        return ImageFormat(channels, (height, width), keywords=("pixel_values", "labels"))
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = tuple(config.get("mean") or ()), tuple(config.get("std") or ())
    if len(mean) == len(std) == channels:
        return ImageFormat(channels, (height, width), mean, std)
    return ImageFormat(channels, (height, width))
