"""Measured latencies of options: the real layers in the real shapes, in turns, remembered on disk as ratios.

A table entry is the time of an option's layers relative to those that stand there now, at one batch size. The ratio
is remembered, by device, threads, dtype, library versions and shapes; the share of the model's time that the present
layers take is measured anew each time, inside the model (`in_place`), so that a slow day does not spoil the table.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linearize.algebra.forms import Piece
from linearize.approximate.blocks import Block
from linearize.approximate.editable import fold_of
from linearize.bench import interleaved
from linearize.errors import LinearizeError
from linearize.gate import ChannelGate, gates
from linearize.groups import ports_of
from linearize.planning.in_place import Shares
from linearize.planning.options import BORDERED, Group, Option, SiteChoice
from linearize.planning.price import Pricer
from linearize.report.timing import environment
from linearize.running.models import evaluating
from linearize.sites import Port, Site
from linearize.storage import atomic, schema
from linearize.surgery.layers import PartialActivation
from linearize.surgery.make import layer_spec
from linearize.surgery.specs import build

__all__ = ["LatencyTable", "cache_file", "with_latencies"]

Run = Callable[[], Any]

_LARGEST_FILE = 2**26  # bytes
_LARGEST_PART = 0.95  # of the whole model's time that the layers around activations can take


def cache_file() -> Path:
    """Where ratios are remembered: `$LINEARIZE_CACHE`, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LINEARIZE_CACHE") or Path(home) / "linearize") / "latency.json"


@dataclass
class LatencyTable:
    """Ratios of latencies, by a key that names everything they depend on.

    Attributes:
        path: the file; None remembers nothing beyond this object.
        entries: what is known.
    """

    path: Path | None = None
    entries: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> LatencyTable:
        """The table in a file, without entries that are no ratios; an empty one if there is none that can be read."""
        try:
            data = schema.parse(atomic.read_file(path, limit=_LARGEST_FILE)) if path is not None else {}
        except (LinearizeError, ValueError):
            data = {}
        entries = data.items() if isinstance(data, dict) else ()
        return cls(path, {key: float(value) for key, value in entries if len(key) <= 200 and _is_ratio(value)})

    def save(self) -> None:
        """Write the table, if it has a file and that can be written: a cache must not stop anybody's work."""
        if self.path is None:
            return
        text = json.dumps({key: value for key, value in self.entries.items() if _is_ratio(value)})
        with suppress(OSError, LinearizeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(self.path, lambda file: file.write(text.encode()))


def _is_ratio(value: Any) -> bool:
    """True for a number that a ratio of latencies can be: whatever else stands in the table is measured anew."""
    return type(value) in (int, float) and 1e-6 <= value <= 1e6


@dataclass(frozen=True)
class _Bench:
    """Where and how latencies are measured."""

    model: nn.Module
    shapes: dict[str, tuple[int, ...]]
    batch: int
    sizes: Sequence[int]
    rounds: int
    blocks: Mapping[str, Block]

    @property
    def like(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.is_floating_point())


def with_latencies(
    model: nn.Module,
    groups: Sequence[Group],
    shapes: dict[str, tuple[int, ...]],
    whole: dict[int, float],
    *,
    batch: int,
    table: LatencyTable,
    shares: Shares | None = None,
    blocks: Mapping[str, Block] | None = None,
    rounds: int = 7,
) -> list[Group]:
    """The groups with measured latencies, as shares of the whole model's.

    Args:
        model: gated.
        groups: with options from `candidates`.
        shapes: of each site's input in a batch of size `batch`; a site without one is not measured.
        whole: seconds of the whole original model, by batch size.
        batch: size of the batch in which the shapes were seen.
        table: where ratios are looked up and noted.
        shares: of the model's time, by the name of a group's first site; one that is not known is measured by itself.
        blocks: by the name of their first site.
        rounds: measurements of each.

    Options whose layers cannot be run by themselves are given the share of time that their FLOPs would take.
    """
    bench = _Bench(model, shapes, batch, list(whole), rounds, blocks or {})
    with evaluating(model):
        measured = [_measured(bench, group, whole, table, shares or {}) for group in groups]
    table.save()
    # Layers run by themselves take longer than in the model, where calls overlap: together no longer than the whole.
    parts = sum(group.stay.cost("latency") for group in measured)
    factor = min(1.0, _LARGEST_PART / parts) if parts else 1.0
    return [
        replace(g, options=tuple(replace(o, latency=o.cost("latency") * factor) for o in g.options)) for g in measured
    ]


def _measured(bench: _Bench, group: Group, whole: dict[int, float], table: LatencyTable, shares: Shares) -> Group:
    found = [0.0] * len(group.options)
    for size, seconds in whole.items():
        ratios, own = _ratios(bench, group, size, table) if len(group.options) > 1 else ([1.0], 0.0)
        stay = shares.get(group.sites[0], {}).get(size, own / seconds) if own else 0.0
        for index, ratio in enumerate(ratios):
            found[index] += ratio * stay / len(whole)
    options = tuple(replace(o, latency=share) for o, share in zip(group.options, found, strict=True))
    return replace(group, options=options)


def _ratios(bench: _Bench, group: Group, size: int, table: LatencyTable) -> tuple[list[float], float]:
    """Time of every option relative to the first, and the seconds of the first."""
    named = gates(bench.model)
    chain = [named[name] for name in group.sites]
    shape = bench.shapes.get(group.sites[0])
    by_flops = [option.flops / max(group.stay.flops, 1.0) for option in group.options]
    if shape is None or shape[0] % bench.batch:
        return by_flops, 0.0
    like = bench.like
    shape = (shape[0] // bench.batch * size, *shape[1:])
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    pricer = Pricer(bench.model, chain)
    try:
        present = _present(bench.model, chain)
        present(x)
        runs: dict[str, Run] = {"stay": lambda: present(x)}
        keys = ["stay"]
        for option in group.options[1:]:
            layers, text = _option(bench.model, chain, pricer, option, bench.blocks)
            key = _key(bench, chain, shape, text)
            keys.append(key)
            if key not in table.entries and key not in runs:
                call = _Chain(chain, layers, {})
                call(x)
                runs[key] = _bound(call, x)
    except Exception:  # whatever stands between the maps may need the shapes that it knows
        return by_flops, 0.0
    samples = interleaved(runs, like.device, bench.rounds, 2)
    for key, values in samples.items():
        if key != "stay":
            ratios = torch.tensor(values) / torch.tensor(samples["stay"])
            table.entries[key] = float(ratios.median())
    own = float(torch.tensor(samples["stay"]).median())
    return [1.0, *(table.entries[key] for key in keys[1:])], own


def _bound(call: Callable[[Tensor], Any], x: Tensor) -> Run:
    return lambda: call(x)


def _key(bench: _Bench, chain: Sequence[ChannelGate], shape: tuple[int, ...], text: str) -> str:
    like = bench.like
    facts = environment(like.device, like.dtype)
    where = {name: facts[name] for name in ("device", "threads", "dtype", "torch")}
    sites = [(repr(_released(gate)), gate.axis, gate.channels, len(_folds(gate.site))) for gate in chain]
    before = [(p.kind, p.total) for gate in chain if gate.site is not None for p in ports_of(gate.site)]
    told = json.dumps([where, shape, sites, before, text], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def _released(gate: ChannelGate) -> nn.Module:
    """The activation as it will stand in the collapsed model; the gate is left as it is."""
    return copy.deepcopy(gate).released()


def _folds(site: Site | None) -> tuple[Any, ...]:
    return () if site is None else (*site.folds, *site.up_folds, *site.consumer_folds)


def _present(model: nn.Module, chain: Sequence[ChannelGate]) -> Callable[[Tensor], Any]:
    """The layers of a group as they stand in the model, norms included, gates not."""
    ports = {port.module for gate in chain if gate.site is not None for port in ports_of(gate.site)}
    layers = {path: model.get_submodule(path) for path in ports}
    layers |= {f"{gate.site.name} activation": _released(gate) for gate in chain if gate.site is not None}
    folds = {}
    for gate in chain:
        if gate.site is not None and gate.site.folds:
            scale, shift = fold_of(model, gate.site.folds, gate.channels)
            weight = next(model.parameters())
            folds[gate.site.name] = (scale.to(weight), shift.to(weight))
    return _Chain(chain, layers, folds)


def _option(
    model: nn.Module, chain: Sequence[ChannelGate], pricer: Pricer, option: Option, blocks: Mapping[str, Block]
) -> tuple[dict[str, nn.Module], str]:
    """Layers of an option with random weights, and a text that tells their shapes."""
    block = blocks.get(option.choices[0].site)
    if block is not None and option.choices[0].block:
        return _block_layers(model, block, option.choices[0])
    price = pricer.after(option.choices)
    dims = {port.module: port.dims for gate in chain if gate.site is not None for port in ports_of(gate.site)}
    like = next(p for p in model.parameters() if p.is_floating_point())
    layers: dict[str, nn.Module] = {}
    texts = []
    for path, piece in price.pieces.items():
        spec = _spec(piece, dims[path], model.get_submodule(path))
        layers[path] = build(spec, model.get_submodule(path)).to(like.device, like.dtype).eval()
        texts.append(json.dumps(spec, sort_keys=True))
    for gate, choice in zip(chain, option.choices, strict=True):
        if gate.site is not None:
            inner: nn.Module = nn.Identity()
            if choice.keep:
                inner = _released(gate)
                if choice.rank:
                    inner = PartialActivation(
                        gate.activation, choice.keep, gate.axis, gate.in_place and gate.site.direct
                    )
            layers[f"{gate.site.name} activation"] = inner
            texts.append(f"{choice.keep} {choice.rank} {choice.form}")
    return layers, "; ".join(texts)


def _block_layers(model: nn.Module, block: Block, choice: SiteChoice) -> tuple[dict[str, nn.Module], str]:
    """One convolution, and nothing after it."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    spec = block.spec(choice.rank, bordered=choice.form == BORDERED)
    layers: dict[str, nn.Module] = {path: nn.Identity() for path in block.maps}
    layers[block.first.module] = build(spec, nn.Identity()).to(like.device, like.dtype).eval()
    layers |= {f"{site.name} activation": nn.Identity() for site in block.sites}
    return layers, json.dumps(spec, sort_keys=True)


def _spec(piece: Piece, dims: int, old: nn.Module) -> dict[str, Any]:
    if piece.layer == "identity" or piece.affine is None:
        return {"type": "Ones", "width": piece.number} if piece.layer == "all_ones" else {"type": "Identity"}
    return layer_spec(piece, piece.affine, dims, bias=getattr(old, "bias", None) is not None)


class _Chain:
    """Runs the layers of a group one after the other, as the model would."""

    def __init__(
        self, chain: Sequence[ChannelGate], layers: dict[str, nn.Module], folds: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        self.gates, self.layers, self.folds = chain, layers, folds

    def __call__(self, x: Tensor) -> Any:
        outputs: list[Tensor] = []
        for gate in self.gates:
            site = gate.site
            if site is None or site.producer is None:
                raise ValueError("a site without a producer")
            if not outputs:
                outputs = [self._layer(site.producer)(x)]
            h = outputs[0]
            up: Tensor | None = None
            if site.up is not None:
                if site.up.module == site.producer.module:
                    first, second = h.chunk(2, -1)
                    h, up = (first, second) if site.producer.start == 0 else (second, first)
                else:
                    up = self._layer(site.up)(x)
            if site.name in self.folds:
                scale, shift = self.folds[site.name]
                axis = -gate.axis - 1
                h = _norm(h, scale, shift, axis)
            h = self.layers[f"{site.name} activation"](h)
            h = h if up is None else h * up
            outputs = [self._layer(port)(h) for port in site.consumers]
        return outputs

    def _layer(self, port: Port) -> nn.Module:
        return self.layers[port.module]


def _norm(h: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """A norm in eval mode costs what this costs."""
    if axis == h.dim() - 2:
        return functional.batch_norm(h, torch.zeros_like(shift), torch.ones_like(scale), scale, shift)
    sizes = (-1, *(1,) * axis)
    return torch.addcmul(shift.view(sizes), h, scale.view(sizes))
