"""The configuration of a Llama-like decoder whose layers differ: `block_configs` says of each layer how.

Servers read it with `trust_remote_code`: an attention has `n_heads_in_group` queries for each key and may be gone
(`no_op`); an FFN has the width `2 / 3 * ffn_mult * hidden_size`, rounded up to a multiple of 256, and may be gone, too.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class BlockConfig(dict[str, Any]):
    """A dict whose entries are read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    """A Llama's configuration with `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            BlockConfig({part: BlockConfig(said) for part, said in block.items()}) for block in block_configs
        ]
