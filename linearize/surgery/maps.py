"""Read the affine maps of a site from the model, in float64, with the constant maps between them folded in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.affine import Affine, dense, norm_scale_shift, rows, scaled
from linearize.algebra.finite import all_finite
from linearize.algebra.forms import Infeasible, Maps, Pieces
from linearize.errors import CollapseError
from linearize.gate import ChannelGate
from linearize.sites import Fold, Port, Site
from linearize.surgery.probe import has_own_forward, probed
from linearize.tensors import held, meddler


@dataclass
class Reader:
    """Reads maps from a model, or from the pieces that sites further down have already been given.

    Attributes:
        model: where the weights are.
        device: where the maps go; "meta" for shapes only, None to leave them.
        pieces: what has been decided so far, by place.
    """

    model: nn.Module
    device: str | None = None
    pieces: Pieces = field(default_factory=dict)

    def maps(self, site: Site, gate: ChannelGate, linear: Tensor, fixed_producer: bool) -> Maps:
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
        consumers = tuple(self.consumed(port, site) for port in site.consumers)
        slope, intercept = self._surrogate(site, gate)
        linear = linear.to(slope.device)
        if site.gated_unit and bool((slope[linear] != 0).any()):
            raise Infeasible("a gated unit is linear only where its gate is a constant (slope 0)")
        steady = site.steady and not any(consumer.padded for consumer in consumers)
        drops = linear & (slope == 0) & (intercept == 0) if site.gated_unit or not steady else linear & (slope == 0)
        index = {
            name: self.index(mask)
            for name, mask in (("keep", ~linear), ("linear", linear & ~drops), ("dropped", drops))
        }
        ports = [port for port in (site.producer, site.up, *site.consumers) if port is not None]
        return Maps(
            producer=producer,
            consumers=consumers,
            producer_at=(site.producer.module, site.producer.dims),
            consumers_at=tuple((port.module, port.dims) for port in site.consumers),
            slope=self._place(slope),
            intercept=self._place(intercept),
            up=up,
            up_at=(site.up.module, site.up.dims) if site.up is not None else ("", 0),
            steady=site.steady,
            direct=site.direct,
            grouped=any(self._groups(port) > 1 for port in ports),
            packed=_packed(site),
            fixed_producer=fixed_producer,
            **index,
        )

    def check_replaceable(self, site: Site, gate: ChannelGate) -> None:
        """A hook, or a forward put on one object, would be lost with the module that it is on.

        Raises:
            Infeasible: a module of the site has one.
        """
        ports = [port.module for port in (site.producer, site.up, *site.consumers) if port is not None]
        folds = [fold.module for fold in (*site.folds, *site.up_folds, *site.consumer_folds)]
        modules: dict[str, nn.Module] = {path: self.model.get_submodule(path) for path in (*ports, *folds)}
        for path, module in {**modules, site.name: gate.activation}.items():
            found = meddler(module)
            if found is not None:
                raise Infeasible(f"{path} has {found}, which would be lost: take it off before, put it on again afterwards")

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
        """Weights of the map at a place, as things stand."""
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

    def _affine(self, port: Port) -> Affine:
        piece = self.pieces.get(port.module)
        if piece is not None:
            if piece.layer != "plain" or piece.affine is None or piece.affine.groups > 1:
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
        padding = _padding(module)
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
        """The same for a depthwise producer, with its small kernels as they are: weight (C, 1, *k).

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
            made = Affine(weight, bias, tuple(module.stride), _padding(module), tuple(module.dilation))
        else:
            full = self._affine(site.producer)
            each = torch.arange(len(full.weight), device=full.weight.device)
            made = replace(full, weight=full.weight[each, each].unsqueeze(1))
        return replace(self._folded(made, site.folds), groups=len(made.weight))

    def consumed(self, port: Port, site: Site) -> Affine:
        """The map of one consumer, with the constant maps before it.

        Raises:
            Infeasible: it has already been given another form, or a shift does not reach every position alike.
        """
        affine = self._affine(port)
        self._check_width(port, affine.weight.shape[1], "inputs")
        for fold in reversed(site.consumer_folds):
            scale, shift = self._scale_shift(fold, affine.weight.shape[1])
            if (shift.device.type == "meta" or bool((shift != 0).any())) and (affine.padded or not site.steady):
                raise Infeasible(f"the shift of {fold.module} does not reach every position alike")
            scale, shift = self._place(scale), self._place(shift)
            weight = affine.weight
            total = weight.flatten(2).sum(2) if affine.dims else weight
            scaled_weight = weight * scale.view(1, -1, *(1,) * affine.dims)
            affine = replace(affine, weight=scaled_weight, bias=affine.bias + total @ shift)
        return affine

    def _folded(self, affine: Affine, folds: tuple[Fold, ...]) -> Affine:
        for fold in folds:
            scale, shift = self._scale_shift(fold, affine.weight.shape[0])
            affine = scaled(affine, self._place(scale), self._place(shift))
        return affine

    def _scale_shift(self, fold: Fold, channels: int) -> tuple[Tensor, Tensor]:
        weight, bias, mean, var = (self._tensor(name) for name in (fold.weight, fold.bias, fold.mean, fold.var))
        return norm_scale_shift(weight, bias, mean, var, fold.eps, channels)

    def _tensor(self, name: str | None) -> Tensor | None:
        if name is None:
            return None
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
        """Where a mask is True, on the device of the maps."""
        return self._place(mask.nonzero().flatten())


def _padding(module: Any) -> tuple[int, ...]:
    """Padding in numbers, also where the convolution says "same" or "valid"."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        raise Infeasible("its padding is not the same on both sides")
    return tuple(total // 2 for total in totals)


def _packed(site: Site) -> str | None:
    if site.up is None or site.producer is None or site.up.module != site.producer.module:
        return None
    return "gate_first" if site.producer.start == 0 else "up_first"
