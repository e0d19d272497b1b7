"""Small example inputs for transformers models, derived from the forward's signature and the configuration.

Shape letters: B batch, T tokens, F audio frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CaptureError

TOKENS = 8
"""T, the length of example sequences."""


class _Maker:
    """Makes one argument at a time; methods are named after the argument that they make."""

    def __init__(self, model: Any, batch: int, like: Tensor) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self.device, self.dtype = like.device, like.dtype

    # -- what the configuration says

    def setting(self, *names: str, parts: tuple[str, ...] = (), default: Any = None) -> Any:
        """The first of ``names`` that is set; configurations with one of ``parts`` in their key go first."""
        configs = [self.config]
        for key in getattr(self.config, "sub_configs", {}):
            part = getattr(self.config, key, None)
            if part is not None and hasattr(part, "to_dict"):
                preferred = any(word in key for word in parts)
                configs.insert(0, part) if preferred else configs.append(part)
        for config in configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def floats(self, *shape: int) -> Tensor:
        """Normal random values in the model's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        """Random indices, off the lowest ones where special tokens tend to be."""
        low = min(4, max(high - 1, 0))
        return torch.randint(low, max(high, low + 1), shape, device=self.device)

    # -- arguments

    def input_ids(self) -> Tensor:
        """Token ids (B, T)."""
        vocabulary = self.setting("vocab_size", "src_vocab_size", parts=("text", "encoder"), default=64)
        return self.ids(int(vocabulary), self.batch, TOKENS)

    def decoder_input_ids(self) -> Tensor:
        """Token ids (B, T) for the decoder."""
        names = ("decoder_vocab_size", "tgt_vocab_size", "vocab_size")
        return self.ids(int(self.setting(*names, parts=("decoder",), default=64)), self.batch, TOKENS)

    def attention_mask(self) -> Tensor:
        """Ones (B, T)."""
        return torch.ones(self.batch, TOKENS, dtype=torch.long, device=self.device)

    decoder_attention_mask = attention_mask

    def inputs_embeds(self) -> Tensor:
        """Embeddings (B, T, hidden)."""
        return self.floats(self.batch, TOKENS, int(self.setting("hidden_size", "d_model", default=64)))

    def pixel_values(self) -> Tensor:
        """Images (B, channels, height, width)."""
        return self.floats(self.batch, *self.image())

    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        parts = ("vision", "image", "backbone", "encoder")
        size = self.setting("image_size", "img_size", "input_size", parts=parts)
        if size is None:
            size = 64
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        height, width = size[-2:] if isinstance(size, (tuple, list)) else (size, size)
        channels = self.setting("num_channels", "in_channels", "in_chans", parts=parts, default=3)
        channels = channels[0] if isinstance(channels, (tuple, list)) else channels
        return int(channels), int(height), int(width)

    def pixel_values_videos(self) -> Tensor:
        """Videos (B, frames, channels, height, width)."""
        return self.floats(self.batch, int(self.setting("num_frames", default=2)), *self.image())

    def input_features(self) -> Tensor:
        """Spectrograms: (B, bins, F) where the model fixes F (Whisper's way), else (B, F, bins)."""
        parts = ("audio", "speech", "encoder")
        names = ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_channels", "input_dim")
        bins = int(self.setting(*names, parts=parts, default=80))
        positions = self.setting("max_source_positions", parts=parts)
        if positions is not None and self.setting("num_mel_bins", parts=parts) is not None:
            return self.floats(self.batch, bins, 2 * int(positions))
        return self.floats(self.batch, 64, bins)

    def input_values(self) -> Tensor:
        """A waveform (B, samples), or a spectrogram (B, F, bins) where the configuration has bins."""
        bins, frames = self.setting("num_mel_bins"), self.setting("max_length")
        if bins is not None and frames is not None:
            return self.floats(self.batch, int(frames), int(bins))
        return self.floats(self.batch, 2000)

    def bbox(self) -> Tensor:
        """Boxes (B, T, 4)."""
        box = torch.tensor([10, 10, 20, 20], device=self.device)
        return box.expand(self.batch, TOKENS, 4).contiguous()


def example_inputs(model: Any, *, batch: int, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments for ``model.forward``: its main input, what it requires, and what a decoder needs.

    Raises:
        CaptureError: the forward requires an argument that no rule here can make.
    """
    parameters = inspect.signature(model.forward).parameters
    maker = _Maker(model, batch, like)
    kwargs: dict[str, Any] = {}
    for name in _wanted(model, parameters):
        make: Callable[[], Any] | None = getattr(maker, name, None)
        if make is None:
            found = f"its forward requires {name!r}, which cannot be derived from the configuration"
            raise CaptureError(type(model).__name__, found, "Pass example_inputs= as a dict of keyword arguments.")
        kwargs[name] = make()
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    return (), kwargs


def _wanted(model: nn.Module, parameters: Any) -> list[str]:
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main] if main in parameters else []
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        )
        if required and name not in wanted:
            wanted.append(name)
    towers = {"text": "input_ids", "vision": "pixel_values", "audio": "input_features"}
    if len(wanted) <= 1:
        for key in getattr(config, "sub_configs", {}):
            for word, name in towers.items():
                if (
                    word in key
                    and name in parameters
                    and name not in wanted
                    and not hasattr(config, f"{word}_token_id")
                ):
                    wanted.append(name)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    return list(dict.fromkeys(wanted))
