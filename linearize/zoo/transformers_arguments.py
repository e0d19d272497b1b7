"""Small arguments for transformers models, by name: tensors for ``pixel_values`` and others, from the configuration.

Shape letters: B batch, T tokens, F audio frames, P patches, C image channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linearize.zoo.settings import Settings

TOKENS = 8
"""T, the length of example sequences."""


def _number(value: Any) -> int:
    """A setting that is one number, or a list of one per axis."""
    return int(value[-1] if isinstance(value, (tuple, list)) else value)


class Arguments(Settings):
    """Makes one argument at a time; public methods are named after the argument that they make."""

    # Text

    def input_ids(self) -> Tensor:
        """Token ids (B, T)."""
        vocabulary = self._setting("vocab_size", "src_vocab_size", parts=("text", "encoder", "language"), default=64)
        return self._ids(int(vocabulary), self.batch, TOKENS)

    qformer_input_ids = tasks_input_ids = input_ids

    def decoder_input_ids(self) -> Tensor:
        """Token ids (B, T) for the decoder; (B, T, channels) where it predicts several codes at once."""
        names = ("decoder_vocab_size", "tgt_vocab_size", "vocab_size")
        high = int(self._setting(*names, parts=("decoder",), default=64))
        channels = self._setting("num_channels", parts=("decoder",)) if self._setting("delay_pattern") else None
        return self._ids(high, self.batch, TOKENS, *([int(channels)] if channels else []))

    def attention_mask(self) -> Tensor:
        """Ones (B, T)."""
        return self._ones(self.batch, TOKENS)

    decoder_attention_mask = tasks_attention_mask = qformer_attention_mask = attention_mask

    def inputs_embeds(self) -> Tensor:
        """Embeddings (B, T, width)."""
        width = self._setting("hidden_size", "d_model", parts=("text",), default=64)
        return self._floats(self.batch, TOKENS, int(width))

    def query_embeds(self) -> Tensor:
        """Queries (B, T, width)."""
        return self.inputs_embeds()

    def encoder_hidden_states(self) -> Tensor:
        """What a decoder attends to (B, T, encoder width)."""
        return self._floats(self.batch, TOKENS, int(self._setting("encoder_hidden_size", "hidden_size", default=64)))

    def bbox(self) -> Tensor:
        """Boxes (B, T, 4), or (B, T, 8) where the type wants four corners."""
        *_, count = self._affordable(self.batch, TOKENS, int(self._setting("dim_bbox", default=4)))
        return torch.tensor([10, 10, 20, 20] * (count // 4), device=self.device).repeat(self.batch, TOKENS, 1)

    # Images

    def pixel_values(self) -> Tensor:
        """Images (B, C, height, width)."""
        return self._floats(self.batch, *self._image())

    image = pixel_values

    def _image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        parts = ("vision", "image", "backbone", "encoder")
        size = self._setting("image_size", "img_size", "input_size", "spec_size", parts=parts)
        patch = self._setting("patch_size", parts=parts)
        patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        if size is None:
            size = 4 * patch if isinstance(patch, int) and patch > 8 else 64
        height, width = size[-2:] if isinstance(size, (tuple, list)) else (size, size)
        channels = self._setting("num_channels", "in_channels", "in_chans", parts=parts, default=3)
        return _number(channels), int(height), int(width)

    def pixel_values_videos(self) -> Tensor:
        """Videos (B, frames, C, height, width)."""
        return self._floats(self.batch, int(self._setting("num_frames", "frames_per_clip", default=2)), *self._image())

    def grid(self) -> tuple[int, int, int, int]:
        """Rows and columns of patches, values per patch, and the side of what is merged into one token."""
        parts = ("vision", "visual")
        merge = _number(self._setting("spatial_merge_size", "merge_size", "merge_kernel_size", parts=parts, default=1))
        patch = _number(self._setting("patch_size", parts=parts, default=14))
        channels = _number(self._setting("in_channels", "in_chans", "num_channels", parts=parts, default=3))
        depth = _number(self._setting("temporal_patch_size", parts=parts, default=1))
        side = max(2 * merge, 4)
        return side, side, channels * depth * patch * patch, merge

    def patches(self) -> Tensor:
        """Flattened patches of all images together (B * P, values)."""
        rows, columns, values, _ = self.grid()
        return self._floats(self.batch * rows * columns, values)

    def grid_thw(self) -> Tensor:
        """Frames, rows and columns of patches (B, 3)."""
        rows, columns, _, _ = self.grid()
        return torch.tensor([[1, rows, columns]] * self.batch, device=self.device)

    image_grid_thw = grid_thw

    def image_sizes(self) -> Tensor:
        """Heights and widths of the images (B, 2)."""
        _, height, width = self._image()
        return torch.tensor([[height, width]] * self.batch, device=self.device)

    def merge_sizes(self) -> Tensor:
        """Ones (B,)."""
        return self._ones(self.batch)

    # Sound

    def _bins(self) -> int:
        names = (
            "num_mel_bins", "n_mel_bins", "input_feat_per_channel", "input_feat_size", "mel_bins", "input_channels",
            "input_dim", "feature_size", "n_mels", "mel_dim",
        )  # fmt: skip
        return _number(self._setting(*names, parts=("audio", "speech", "encoder"), default=80))

    def _spectrogram_frames(self) -> int:
        positions = self._setting("max_source_positions", parts=("audio", "speech", "encoder"))
        return 2 * int(positions) if positions and positions <= 1500 else 64

    def input_features(self) -> Tensor:
        """Spectrograms (B, F, bins)."""
        return self._floats(self.batch, 64, self._bins())

    def input_features_mask(self) -> Tensor:
        """Ones (B, F)."""
        return self._ones(self.batch, 64)

    def input_values(self) -> Tensor:
        """Waveforms (B, samples)."""
        return self._floats(self.batch, 2000)

    # Series

    def past_values(self) -> Tensor:
        """Observed values (B, length) or (B, length, channels)."""
        length = int(self._setting("context_length", "prediction_length", default=16))
        lags = self._setting("lags_sequence")
        channels = int(self._setting("num_input_channels", "input_size", default=1))
        shape = (length + max(lags),) if lags else (length,)
        return self._floats(self.batch, *shape, *([channels] if channels > 1 or not lags else []))

    def past_observed_mask(self) -> Tensor:
        """Ones, of the shape of the values."""
        return torch.ones_like(self.past_values())

    def past_time_features(self) -> Tensor:
        """Features of the times observed (B, length, features)."""
        features = int(self._setting("num_time_features", default=0))
        return self._floats(self.batch, self.past_values().shape[1], features)

    def _first_widths(self) -> list[int]:
        """What the first layers of the model take, as guesses of the bins of a spectrogram."""
        found: dict[int, None] = {}
        for module in self.model.modules():
            width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
            if isinstance(width, int) and width > 8 and len(found) < 4:
                found[width] = None
        return list(found)

    # What single families ask for, by the names that they use

    def visual_feats(self) -> Tensor:
        """Features of regions of an image (B, T, features)."""
        return self._floats(self.batch, TOKENS, int(self._setting("visual_feat_dim", default=64)))

    def visual_pos(self) -> Tensor:
        """Boxes of these regions (B, T, 4)."""
        shape = self._affordable(self.batch, TOKENS, int(self._setting("visual_pos_dim", default=4)))
        return torch.rand(shape).to(self.device, self.dtype)

    def states(self) -> Tensor:
        """States of an agent (B, T, state)."""
        return self._floats(self.batch, TOKENS, int(self._setting("state_dim", default=4)))

    def actions(self) -> Tensor:
        """Actions of an agent (B, T, action)."""
        return self._floats(self.batch, TOKENS, int(self._setting("act_dim", default=4)))

    def rewards(self) -> Tensor:
        """Rewards of an agent (B, T, 1)."""
        return self._floats(self.batch, TOKENS, 1)

    returns_to_go = rewards

    def timesteps(self) -> Tensor:
        """Times (B, T)."""
        return torch.arange(TOKENS, device=self.device).repeat(self.batch, 1)

    def target_sizes(self) -> Tensor:
        """Rows and columns of patches (B, 2)."""
        _, height, width = self._image()
        patch = _number(self._setting("patch_size", parts=("vision",), default=14))
        return torch.tensor([[height // patch, width // patch]] * self.batch, device=self.device)

    spatial_shapes = target_sizes

    def pixel_attention_mask(self) -> Tensor:
        """Ones (B, P)."""
        rows, columns = (int(n) for n in self.target_sizes().tolist()[0])
        return self._ones(self.batch, rows * columns)

    def pixel_position_ids(self) -> Tensor:
        """Column and row of each patch (B, P, 2)."""
        rows, columns, _, _ = self.grid()
        self._affordable(self.batch, rows, columns, 2)
        places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).to(self.device)
        return places.repeat(self.batch, 1, 1)

    def audio_mel(self) -> Tensor:
        """Spectrograms (B, F, bins)."""
        return self.input_features()

    def audio_mel_mask(self) -> Tensor:
        """Mask of the places without sound (B, F); there are none."""
        return torch.zeros(self.batch, 64, dtype=torch.bool, device=self.device)

    def freq(self) -> Tensor:
        """Zeros (B, 1)."""
        return torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)

    def past_values_padding(self) -> Tensor:
        """Zeros, of the shape of the values."""
        return torch.zeros_like(self.past_values())

    def inputs(self) -> Tensor:
        """Embeddings (B, T, width)."""
        return self._floats(self.batch, TOKENS, int(self._setting("d_model", "hidden_size", default=64)))

    def prompt_pixel_values(self) -> Tensor:
        """Images (B, C, height, width)."""
        return self.pixel_values()

    prompt_masks = prompt_pixel_values

    def image_attention_mask(self) -> Tensor:
        """Ones (B, T, 1)."""
        return self._ones(self.batch, TOKENS, 1)

    # Alternatives

    def alternatives(self, name: str) -> Iterator[Any]:
        """Other forms in which models take the argument ``name``, more common ones first."""
        if name == "pixel_values":
            channels, height, width = self._image()
            yield self._floats(self.batch, 1, channels, height, width)
            yield self._floats(self.batch, int(self._setting("num_frames", default=2)), channels, height, width)
            yield self._floats(self.batch, 2, channels, height, width)
            patch = _number(self._setting("patch_size", parts=("vision",), default=14))
            for side in (64, 224, 384, *([4 * patch] if patch > 64 else [])):
                yield self._floats(self.batch, channels, side, side)
            yield self.patches()
            yield self.patches().view(self.batch, -1, self.grid()[2])
            yield self.patches().view(-1, channels, patch, self.grid()[2] // (channels * patch))
        elif name == "input_features":
            yield self._floats(self.batch, self._bins(), self._spectrogram_frames())
            yield self._floats(self.batch, 1, 64, self._bins())
            yield self._floats(self.batch, 1, int(self._setting("spec_size", default=256)), self._bins())
            for bins in self._first_widths():
                yield self._floats(self.batch, 64, bins)
                yield self._floats(self.batch, bins, 64)
        elif name == "input_values":
            yield self._floats(self.batch, 1, 2000)
            yield self._floats(self.batch, int(self._setting("max_length", default=64)), self._bins())
            yield self._floats(self.batch, 1, 24000)
            yield self._ids(int(self._setting("vocab_size", default=64)), self.batch, TOKENS)
        elif name in ("hidden_states", "latents"):
            width = int(self._setting("hidden_size", "d_model", default=64))
            yield self._floats(self.batch, TOKENS, width)
            yield self._floats(self.batch, width, TOKENS)
        elif name == "input_ids":
            books = self._setting("num_codebooks", "n_codebooks", "num_code_groups")
            if books:
                high = int(self._setting("codebook_size", "audio_vocab_size", "vocab_size", default=64))
                yield self._ids(high, self.batch, TOKENS, int(books))
                yield self._ids(high, self.batch, TOKENS, int(books) + 1)
                yield self._ids(high, self.batch, int(books), TOKENS)
