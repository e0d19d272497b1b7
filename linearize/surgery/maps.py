"""Read the affine maps of a site from the model, in float64, with the constant maps between them folded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.affine import Affine, behind, columns, dense, rows, scaled
from linearize.algebra.finite import all_finite
from linearize.algebra.piece import Infeasible, Maps, Piece, Pieces
from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate
from linearize.sites.site import Fold, Port, Site
from linearize.surgery.branches import place_of, spliced
from linearize.surgery.folds import scale_shift
from linearize.surgery.probe import has_own_forward, padding_of, probed
from linearize.tensors import held, meddler


@dataclass
class Reader:
    """Reads maps from a model, or from the pieces that later sites have already made.

    Attributes:
        model: where the weights are.
        device: where the maps go; "meta" for shapes only, None to leave them.
        pieces: what has been decided so far, by place.
        widen: whether a branch of a concatenation may become wider.
    """

    model: nn.Module
    device: str | None = None
    pieces: Pieces = field(default_factory=dict)
    widen: bool = True

    def maps(self, site: Site, gate: ChannelGate, linear: Tensor, *, fixed_producer: bool) -> Maps:
        """The maps of a site whose channels in `linear` (bool, (C,)) are to become linear.

        Raises:
            Infeasible: a map has already been given another form, or a constant between the maps cannot be folded.
            CollapseError: a weight or the surrogate is not finite.
        """
        if site.producer is None or not site.consumers:
            raise Infeasible(site.reason or "no linear map before or after it")
        self.check_replaceable(site, gate)
        producer = self.produced(site)
        up = self._folded(self._output(site.up), site.up_folds) if site.up is not None else None
        consumers = tuple(self._consumers(site))
        slope, intercept = self._surrogate(site, gate)
        linear = linear.to(slope.device)
        if site.gated_unit and bool((slope[linear] != 0).any()):
            raise Infeasible("a gated unit is linear only where its gate is a constant (slope 0)")
        steady = site.steady and not any(consumer.padded for consumer in consumers)
        drops = linear & (slope == 0) & (intercept == 0) if site.gated_unit or not steady else linear & (slope == 0)
        masks = (~linear, linear & ~drops, drops)
        keep, lines, dropped = (self.index(mask) for mask in masks)
        apart = list(zip(*(mask.view(site.parts, -1) for mask in masks), strict=True)) if site.parts > 1 else []
        ports = [port for port in (site.producer, site.up, *site.consumers) if port is not None]
        return Maps(
            producer=producer,
            consumers=consumers,
            producer_at=(site.producer.module, site.producer.dims),
            consumers_at=tuple((port.key, port.dims) for port in site.consumers),
            slope=self._place(slope),
            intercept=self._place(intercept),
            up=up,
            up_at=(site.up.module, site.up.dims) if site.up is not None else ("", 0),
            steady=site.steady,
            direct=site.direct,
            bent=site.bent,
            grouped=any(self._groups(port) > 1 for port in ports),
            packed=site.packed,
            fixed_producer=fixed_producer,
            branches=tuple(not port.whole for port in site.consumers),
            parts=tuple(port.part for port in site.consumers),
            apart=tuple((self.index(a), self.index(b), self.index(c)) for a, b, c in apart),
            keep=keep,
            linear=lines,
            dropped=dropped,
        )

    def check_replaceable(self, site: Site, gate: ChannelGate) -> None:
        """Raise if a hook or a forward set on one object would be lost with its module.

        Raises:
            Infeasible: a module of the site has one.
        """
        ports = [port.module for port in (site.producer, site.up, *site.consumers) if port is not None]
        folds = [f.module for f in (*site.folds, *site.up_folds, *site.consumer_folds) if not f.neutral]
        modules: dict[str, nn.Module] = {path: self.model.get_submodule(path) for path in (*ports, *folds)}
        for path, module in {**modules, site.name: gate.activation}.items():
            found = meddler(module)
            if found is not None:
                raise Infeasible(
                    f"{path} has {found}, which would be lost: take it off before, put it on again afterwards"
                )

    def _surrogate(self, site: Site, gate: ChannelGate) -> tuple[Tensor, Tensor]:
        """Slope and intercept of the gate in float64; what they start from, if the model has no values yet."""
        if gate.slope.device.type == "meta":
            start = torch.zeros if site.gated_unit else torch.ones
            return start(site.channels, dtype=torch.float64), torch.zeros(site.channels, dtype=torch.float64)
        slope, intercept = (self._finite(site.name, t.detach()).double() for t in (gate.slope, gate.intercept))
        return slope, intercept

    def weights(self, site: Site) -> float:
        """Multiply-adds of the site's maps as they are now, in one forward of the example inputs."""
        ports = {port.module: port for port in (site.producer, site.up, *site.consumers) if port is not None}
        return float(sum(port.positions * self.numel(path) for path, port in ports.items()))

    def numel(self, path: str) -> int:
        """Number of weights of the map at a place, at present."""
        piece = self.pieces.get(path)
        if piece is None:
            return self._parameter(path, "weight").numel()
        return piece.affine.weight.numel() if piece.affine is not None else 0

    def _output(self, port: Port) -> Affine:
        affine = self._affine(port)
        self._check_width(port, affine.weight.shape[0], "outputs")
        if port.start == 0 and port.stop == port.total:
            return affine
        return rows(affine, self._place(torch.arange(port.start, port.stop, device=self._real(affine))))

    def _real(self, affine: Affine) -> torch.device:
        return affine.weight.device

    def _affine(self, port: Port, piece: Piece | None = None) -> Affine:
        piece = piece or self.pieces.get(port.module)
        if piece is not None:
            known = piece.layer == "plain" or piece.branches
            if not known or piece.affine is None or piece.affine.groups > 1:
                raise Infeasible(f"{port.module} carries the merged term of another site")
            return piece.affine
        module: Any = self.model.get_submodule(port.module)
        if not has_own_forward(module) and self._parameter(port.module, "weight").device.type != "meta":
            return self._moved(probed(port, module))
        weight = self._place(self._parameter(port.module, "weight")).double()
        weight = weight.t() if port.transposed else weight
        if held(module, "bias") is not None:
            bias = self._place(self._parameter(port.module, "bias")).double()
        else:
            bias = weight.new_zeros(weight.shape[0])
        if port.dims == 0:
            return Affine(weight, bias)
        padding = padding_of(module)
        return Affine(dense(weight, module.groups), bias, tuple(module.stride), padding, tuple(module.dilation))

    def _moved(self, affine: Affine) -> Affine:
        return replace(affine, weight=self._place(affine.weight), bias=self._place(affine.bias))

    def _check_width(self, port: Port, width: int, what: str) -> None:
        if width != port.total:
            found = f"has {width} {what}, and had {port.total} when gates were put in"
            raise CollapseError(port.module, found, "Convert the model as it is now.")

    def produced(self, site: Site) -> Affine:
        """The map to a site's channels, with the constant maps behind it.

        Raises:
            Infeasible: it has already been given another form, or there is none.
        """
        if site.producer is None:
            raise Infeasible(site.reason or "no linear map before it")
        return self._folded(self._output(site.producer), site.folds)

    def depthwise(self, site: Site) -> Affine:
        """The map of a depthwise producer, with its small kernels as they are: weight (C, 1, *k).

        Raises:
            Infeasible: it has already been given another form.
        """
        if site.producer is None or site.producer.module in self.pieces:
            raise Infeasible("the depthwise map has been given another form")
        module: Any = self.model.get_submodule(site.producer.module)
        if has_own_forward(module):
            weight = self._place(self._parameter(site.producer.module, "weight")).double()
            bias = weight.new_zeros(len(weight))
            if held(module, "bias") is not None:
                bias = self._place(self._parameter(site.producer.module, "bias")).double()
            made = Affine(weight, bias, tuple(module.stride), padding_of(module), tuple(module.dilation))
        else:
            full = self._affine(site.producer)
            each = torch.arange(len(full.weight), device=full.weight.device)
            made = replace(full, weight=full.weight[each, each].unsqueeze(1))
        return replace(self._folded(made, site.folds), groups=len(made.weight))

    def _consumers(self, site: Site) -> Iterator[Affine]:
        """The map of each consumer; of those that are one module, the first has the bias."""
        seen: set[str] = set()
        for port in site.consumers:
            affine = self.consumed(port, site)
            yield affine if port.module not in seen else replace(affine, bias=torch.zeros_like(affine.bias))
            seen.add(port.module)

    def consumed(self, port: Port, site: Site) -> Affine:
        """The map of one consumer from the site's channels, with the constant maps before it.

        Raises:
            Infeasible: it has already been given another form, or a shift does not reach every position alike.
        """
        before = self.pieces.get(port.module)
        whole = self._whole([other for other in site.consumers if other.module == port.module], site, before)
        if port.whole:
            return whole
        first = place_of(before, port.start)
        index = torch.arange(first, first + port.stop - port.start, device=self._real(whole))
        return columns(whole, index)

    def settled(self, site: Site, made: Pieces) -> Pieces:
        """The pieces of a form, with those of branches put into the whole consumer that they share with others.

        Raises:
            Infeasible: the form cannot be put there.
        """
        found = dict(made)
        for module in dict.fromkeys(port.module for port in site.consumers if not port.whole):
            ports = [port for port in site.consumers if port.module == module]
            before = self.pieces.get(module)
            whole, biases = self._whole(ports, site, before), list[Tensor]()
            folded = {} if before is None else dict.fromkeys(before.folded)
            for port in ports:
                before, whole = spliced(whole, before, port, found.pop(port.key), widen=self.widen)
                biases.append(whole.bias)
                folded |= dict.fromkeys((site.consumer_folds[index], start) for index, start, _ in port.folds)
            if before is not None:
                summed = torch.stack(biases).sum(0)
                found[module] = replace(before, affine=replace(whole, bias=summed), folded=tuple(folded))
        return found

    def _whole(self, ports: Sequence[Port], site: Site, before: Piece | None) -> Affine:
        """A consumer with all its columns, and with the constant maps before it that are not in it yet.

        The ports are the places where it reads the site. What lies nearer to the consumer is folded first.
        """
        affine = self._affine(ports[0], before)
        if before is None or not before.branches:
            self._check_width(ports[0], affine.weight.shape[1], "inputs")
        folded = () if before is None else before.folded
        for index, start, stop in dict.fromkeys(fold for port in ports for fold in reversed(port.folds)):
            fold = site.consumer_folds[index]
            if (fold, start) in folded:
                continue
            scale, shift = self._scale_shift(fold, stop - start)
            scale, shift = scale.to(self._real(affine)), shift.to(self._real(affine))
            moves = any(part is not None for part in (fold.bias, fold.mean, fold.shift))
            if (moves if shift.device.type == "meta" else bool((shift != 0).any())) and (
                affine.padded or not site.steady
            ):
                raise Infeasible(f"the shift of {fold.module} does not reach every position alike")
            affine = behind(affine, place_of(before, start), scale, shift)
        return affine

    def _folded(self, affine: Affine, folds: tuple[Fold, ...]) -> Affine:
        for fold in folds:
            scale, shift = self._scale_shift(fold, affine.weight.shape[0])
            affine = scaled(affine, scale.to(affine.bias.device), shift.to(affine.bias.device))
        return affine

    def _scale_shift(self, fold: Fold, channels: int) -> tuple[Tensor, Tensor]:
        scale, shift = scale_shift(fold, self._tensor, channels)
        return self._place(scale), self._place(shift)

    def _tensor(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        return self._parameter(path, attribute)

    def _parameter(self, path: str, name: str) -> Tensor:
        module = self.model.get_submodule(path)
        tensor = held(module, name)
        if tensor is None:
            found = f"is a {type(module).__name__} without {name}; another layer stood here when gates were put in"
            raise CollapseError(path or type(module).__name__, found, "Convert the model as it is now.")
        return self._finite(f"{path}.{name}" if path else name, tensor.detach())

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" and self.device is None and not all_finite(tensor):
            found = "found NaN" if bool(torch.isnan(tensor).any()) else "found Inf"
            raise CollapseError(name, found, "Mend or exclude this layer: what is not finite cannot be folded.")
        return tensor

    def _groups(self, port: Port) -> int:
        return 1 if port.module in self.pieces else int(getattr(self.model.get_submodule(port.module), "groups", 1))

    def _place(self, tensor: Tensor) -> Tensor:
        if self.device is not None:
            return tensor.to(self.device)
        return tensor

    def index(self, mask: Tensor) -> Tensor:
        """The indices where a mask is True, on the device of the maps."""
        return self._place(mask.nonzero().flatten())
