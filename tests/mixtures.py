"""Small mixtures of experts: models of transformers with large random weights, and lists of experts of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

VOCABULARY = 64
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def rough(model: nn.Module) -> Any:
    """The model with weights that matter: a fresh one gives almost the same for every token."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            size = parameter.shape[-1] if parameter.dim() > 1 else 16
            parameter.add_(torch.randn(parameter.shape, generator=generator) / size**0.5)
    return model.eval()


def _made(kind: str, **settings: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(_SMALL | settings))
    torch.manual_seed(0)
    return rough(getattr(transformers, f"{kind}ForCausalLM")(config))


def mixtral(**settings: Any) -> Any:
    """Gate and up projection in one, which follow each other; weights of the picked are divided by their sum."""
    return _made("Mixtral", **({"num_local_experts": 6} | settings))


def qwen(**settings: Any) -> Any:
    """The first layer has no experts; these have a width of their own."""
    small = {
        "num_experts": 6,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    }
    return _made("Qwen3Moe", **(small | settings))


def olmoe(**settings: Any) -> Any:
    """Weights are not divided by their sum."""
    return _made("Olmoe", **({"num_experts": 6} | settings))


def gpt_oss(**settings: Any) -> Any:
    """Transposed and woven, with biases everywhere."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return _made("GptOss", **({"num_local_experts": 6, "head_dim": 8, "rope_parameters": rope} | settings))


MIXTURES: dict[str, Callable[..., Any]] = {"Mixtral": mixtral, "Qwen3-MoE": qwen, "OLMoE": olmoe, "gpt-oss": gpt_oss}


def texts(count: int = 4, batch: int = 2, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length)
    return [{"input_ids": torch.randint(4, VOCABULARY, shape, generator=generator)} for _ in range(count)]


class Masked(TorchFunctionMode):
    """Inside, linear maps with one of these weights give minus infinity for some outputs."""

    def __init__(self, gone: dict[int, tuple[int, ...]]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear and id(args[1]) in self.gone:
            out[..., list(self.gone[id(args[1])])] = float("-inf")
        return out


class List(nn.Module):
    """Experts as a list of modules, each called on the tokens that picked it."""

    def __init__(self, experts: int = 5, picks: int = 2, *, biased: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(8, experts, bias=biased)
        made = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(experts))
        self.experts, self.picks = nn.ModuleList(made), picks

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).topk(self.picks, -1)
        weights, out = weights.softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = (index == number).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class Net(nn.Module):
    """Two residual mixtures between linear maps."""

    def __init__(self, make: Callable[[], nn.Module] = List) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.ReLU()
        self.mixtures = nn.ModuleList(make() for _ in range(2))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for mixture in self.mixtures:
            x = x + mixture(x)
        out: Tensor = self.last(x)
        return out


def net(make: Callable[[], nn.Module] = List) -> Net:
    """The same with weights that matter."""
    torch.manual_seed(0)
    made: Net = rough(Net(make))
    return made


def points(count: int = 4, batch: int = 64) -> list[Tensor]:
    """Batches of random rows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 6, generator=generator) for _ in range(count)]
