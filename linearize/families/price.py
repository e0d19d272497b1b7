"""The exact cost of an option, from the shapes of the layers that it would leave.

The pieces are made by the same functions that collapse a model, on the meta device, so nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from linearize.algebra.parts import made
from linearize.algebra.piece import IDENTITY, Infeasible, Piece, Pieces
from linearize.families.option import SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import ports_of
from linearize.plan import NARROWED
from linearize.sites.site import Site
from linearize.surgery.maps import Reader
from linearize.surgery.narrow import coupled_sites, narrow
from linearize.tensors import held

__all__ = ["Price", "Pricer"]


@dataclass(frozen=True)
class Price:
    """Cost of a group's maps and units for the example batch, and the layers themselves (shapes only)."""

    flops: float
    params: float
    activations: float
    pieces: Pieces


@dataclass
class Pricer:
    """Prices the options of a group of sites.

    Attributes:
        model: gated; only shapes are read.
        gates: the gates of the group, in order of execution.
        known: prices by shapes and choices: those of a layer hold for all layers like it. Shared between pricers.
    """

    model: nn.Module
    gates: Sequence[ChannelGate]
    known: dict[Any, tuple[float, float, float] | str] = field(default_factory=dict)

    def costs(self, choices: Sequence[SiteChoice]) -> tuple[float, float, float]:
        """FLOPs, parameters and units of the group after the choices, one per site.

        Raises:
            Infeasible: a form cannot express a site.
        """
        key = self._shapes, tuple((choice.keep, choice.rank, choice.form) for choice in choices)
        if key not in self.known:
            try:
                price = self.after(choices)
                self.known[key] = price.flops, price.params, price.activations
            except Infeasible as error:
                self.known[key] = str(error)
        found = self.known[key]
        if isinstance(found, str):
            raise Infeasible(found)
        return found

    @cached_property
    def _shapes(self) -> str:
        """All that a price depends on, with numbers in place of names."""
        sites = self._sites()
        folds = [fold for site in sites for fold in (*site.folds, *site.up_folds, *site.consumer_folds)]
        paths = [site.name for site in sites] + [port.module for site in sites for port in ports_of(site)]
        paths += [fold.module for fold in folds]
        names = {path: f"<{number}>" for number, path in enumerate(dict.fromkeys(paths))}

        def anonymous(value: Any) -> Any:
            if isinstance(value, str):
                parent, _, last = value.rpartition(".")
                return names.get(value) or (f"{names[parent]}.{last}" if parent in names else value)
            if is_dataclass(value) and not isinstance(value, type):
                left_out = ("order", "target", "call")  # where and when it is called
                return [anonymous(getattr(value, f.name)) for f in fields(value) if f.name not in left_out]
            return [anonymous(one) for one in value] if isinstance(value, (list, tuple)) else value

        modules = [self.model.get_submodule(path) for path in names]
        inside = [[(n, tuple(t.shape)) for n, t in (*m.named_parameters(), *m.named_buffers())] for m in modules]
        own = [(type(module).__name__, module.extra_repr(), held) for module, held in zip(modules, inside, strict=True)]
        return repr((anonymous(sites), own, [self._fixed(site) for site in sites]))

    def before(self) -> Price:
        """The cost of the group as it is."""
        ports = {port.module: port for site in self._sites() for port in ports_of(site)}
        reader = Reader(self.model, "meta")
        flops = sum(2.0 * port.positions * self._numel(path) for path, port in ports.items())
        params = sum(_parameters(self.model.get_submodule(path)) for path in ports)
        others = self._others()
        flops -= sum(2.0 * ports[path].positions * rest for path, rest in others.items())
        params -= sum(others.values())
        folds = {f.module: f for s in self._sites() for f in (*s.folds, *s.up_folds, *s.consumer_folds)}
        names = {name for fold in folds.values() for name in (fold.weight, fold.bias) if name is not None}
        tensors = dict(self.model.named_parameters())
        params += sum(tensors[name].numel() for name in names if name in tensors)
        units = sum(float(site.positions * site.channels) for site in self._sites())
        reader.pieces.clear()
        return Price(flops, float(params), units, {})

    def after(self, choices: Sequence[SiteChoice]) -> Price:
        """The cost of the group after the choices, one per site.

        Raises:
            Infeasible: a form cannot express a site.
        """
        reader = Reader(self.model, "meta")
        positions: dict[str, int] = {}
        units = 0.0
        chains = {chain.lower.name: chain for chain in coupled_sites(self.model, self._sites())}
        found = {gate.site.name: gate for gate in self.gates if gate.site is not None}
        for gate, choice in reversed(list(zip(self.gates, choices, strict=True))):
            site = gate.site
            if site is None:
                raise Infeasible("a gate without a site")
            units += float(site.positions * choice.keep)
            if choice.form in ("unchanged", "line"):
                raise Infeasible("it stays as it is")
            for port in ports_of(site):
                positions.setdefault(port.module, port.positions)
            if choice.form == NARROWED:
                if site.name in chains:
                    gone = torch.arange(gate.channels) >= choice.keep
                    reader.pieces.update(narrow(reader, chains[site.name], found, gone))
                continue
            mask = torch.zeros(gate.channels, dtype=torch.bool)
            maps = reader.maps(site, gate, mask, fixed_producer=self._fixed(site))
            index = torch.arange(gate.channels, device="meta")
            end = choice.keep + choice.rank
            maps = replace(maps, keep=index[: choice.keep], linear=index[choice.keep : end], dropped=index[end:])
            reader.pieces.update(reader.settled(site, made(choice.form, maps)))
            if choice.form == "vanished":
                positions.update({port.module: site.consumers[0].positions for port in ports_of(site)})
        others = self._others()
        sizes = {path: _size(piece) - others.get(path, 0) for path, piece in reader.pieces.items()}
        flops = sum(2.0 * positions[path] * size for path, size in sizes.items())
        params = sum(sizes[path] + _bias(piece) for path, piece in reader.pieces.items())
        return Price(flops, float(params), units, dict(reader.pieces))

    def _others(self) -> dict[str, int]:
        """Weights of consumers behind a concatenation that read other branches than those of the group."""
        read: dict[str, set[tuple[int, int]]] = {}
        for site in self._sites():
            for port in site.consumers:
                if not port.whole:
                    read.setdefault(port.module, set()).add((port.start, port.stop))
        totals = {port.module: port.total for site in self._sites() for port in site.consumers}
        shares = {path: sum(stop - start for start, stop in some) / totals[path] for path, some in read.items()}
        return {path: self._numel(path) - round(self._numel(path) * share) for path, share in shares.items()}

    def _sites(self) -> list[Site]:
        return [gate.site for gate in self.gates if gate.site is not None]

    def _fixed(self, site: Site) -> bool:
        """True if a site before it in the group folds into its producer."""
        return any(
            site.producer is not None and port.module == site.producer.module
            for other in self._sites()
            if other.order < site.order
            for port in other.consumers
        )

    def _numel(self, path: str) -> int:
        weight = held(self.model.get_submodule(path), "weight")
        return 0 if weight is None else int(weight.numel())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)


def _size(piece: Piece) -> int:
    return 0 if piece is IDENTITY or piece.affine is None else piece.affine.weight.numel()


def _bias(piece: Piece) -> int:
    border = 0 if piece.border is None else piece.border.numel()
    return border + (0 if piece.affine is None else piece.affine.bias.numel())
