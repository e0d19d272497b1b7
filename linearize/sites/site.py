"""Activation sites: an activation, the affine maps around it, and what can be done with its channels (or why not).

Everything is plain data, so that a site can be printed, pickled with its model, and written to a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from linearize.algebra.constants import Expression, expression_of, with_names


@dataclass(frozen=True)
class Port:
    """The linear map on one side of a site.

    Attributes:
        module: path of the module that holds it.
        kind: "linear", "conv1d", "conv2d" or "conv3d".
        start, stop: the features of that module which are the site's channels: all, except for a packed gated unit, and
            for a consumer behind a concatenation.
        total: how many features the module has on this side.
        transposed: True if the weight is stored (inputs, outputs), as in transformers' ``Conv1D``.
        positions: where the map is evaluated, in the example inputs: tokens or pixels, times the batch.
        folds: for a consumer, which of the site's `consumer_folds` lie before it, and the inputs that each acts on:
            index, start and stop.
        part: for a consumer, which of the site's `parts` it reads.
    """

    module: str
    kind: str
    start: int
    stop: int
    total: int
    transposed: bool
    positions: int
    folds: tuple[tuple[int, int, int], ...] = ()
    part: int = 0

    @property
    def whole(self) -> bool:
        """True if all features of the module on this side are the site's channels."""
        return self.start == 0 and self.stop == self.total

    @property
    def key(self) -> str:
        """An identifier that differs for the ports of one module.

        Examples:
            >>> Port("fuse", "conv2d", 4, 8, 12, False, 1).key
            'fuse[4:8]'
        """
        return self.module if self.whole else f"{self.module}[{self.start}:{self.stop}]"

    @property
    def dims(self) -> int:
        """Spatial dimensions: 0 for a matrix."""
        return 0 if self.kind == "linear" else int(self.kind[-2])


@dataclass(frozen=True)
class Fold:
    """A constant affine map per channel that can be folded away.

    Either a norm, `weight * (x - mean) / sqrt(var + eps) + bias`, or `scale * x + shift`.

    Attributes:
        module: path of the module that computes it and nothing else besides what its children do; or that holds the
            parameters in `neutral`.
        children: names of the children that run after it, in order (the activation of a norm-act layer, for one).
        weight, bias, mean, var: names of its parameters and buffers in the model.
        scale, shift: expressions of parameters and buffers, by their names in the model; None for 1 and 0.
        neutral: names of parameters with the value that makes the map the identity, for a map in the middle of
            somebody's forward: they are set to it, and the module stays. Empty if the module goes.
    """

    module: str
    children: tuple[str, ...] = ()
    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    var: str | None = None
    eps: float = 0.0
    scale: Expression | None = None
    shift: Expression | None = None
    neutral: tuple[tuple[str, float], ...] = ()

    def renamed(self, rename: Callable[[str], str]) -> Fold:
        """The same map in a model with other paths and names."""

        def name(value: str | None) -> str | None:
            return None if value is None else rename(value)

        return replace(
            self,
            module=rename(self.module),
            weight=name(self.weight),
            bias=name(self.bias),
            mean=name(self.mean),
            var=name(self.var),
            scale=with_names(self.scale, rename),
            shift=with_names(self.shift, rename),
            neutral=tuple((rename(parameter), value) for parameter, value in self.neutral),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fold:
        """The map from plain data, as JSON gives it."""
        parts = {key: expression_of(data[key]) for key in ("scale", "shift") if data.get(key) is not None}
        neutral = tuple((str(name), float(value)) for name, value in data.get("neutral", ()))
        return cls(**{**data, **parts, "children": tuple(data["children"]), "neutral": neutral})


@dataclass(frozen=True)
class Site:
    """One activation of a model.

    Attributes:
        name: the site's name, which is the path of the gate in the converted model.
        module: path of the activation module, or of the module whose forward calls the activation function.
        activation: name of the activation, as its class or ATen op.
        channels, axis: number of channels, and their axis counted from the end.
        order: position in the order of execution.
        positions: values per channel in the example inputs.
        call: index of the call inside `module`'s forward, if it must be rewritten for the gate; None for a module swap.
        target: name of the function or child that is called there.
        function, options: for a function, the ATen op and its keyword arguments.
        gated_unit: True for `act(g) * u`.
        ungated: why it gets no gate; None if it gets one.
        reason: why its linear channels cannot be collapsed; None if they can.
        producer, up, consumers: the linear maps around it; `up` is the other factor of a gated unit.
        folds, up_folds, consumer_folds: constant maps per channel between them.
        parts: into how many parts of equal width the channels are taken apart, as by a chunk; 1 for none.
        bent: True if something nonlinear that treats each channel by itself lies before a consumer: a max-pool.
        steady: False if something before the consumers does not keep a constant constant (zero padding, a scale).
        direct: True if nothing but the identity lies between producer, activation and consumers.
        saved: multiply-adds per linear channel and example batch that go if the channel vanishes without a trace.
    """

    name: str
    module: str
    activation: str
    channels: int
    axis: int
    order: int
    positions: int
    call: int | None = None
    target: str = ""
    function: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    gated_unit: bool = False
    ungated: str | None = None
    reason: str | None = None
    producer: Port | None = None
    up: Port | None = None
    consumers: tuple[Port, ...] = ()
    folds: tuple[Fold, ...] = ()
    up_folds: tuple[Fold, ...] = ()
    consumer_folds: tuple[Fold, ...] = ()
    parts: int = 1
    bent: bool = False
    steady: bool = True
    direct: bool = True
    saved: float = 0.0

    @property
    def packed(self) -> str | None:
        """For a gated unit whose two maps are one layer, which half comes first: "gate_first" or "up_first"."""
        if self.up is None or self.producer is None or self.up.module != self.producer.module:
            return None
        return "gate_first" if self.producer.start == 0 else "up_first"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON. `Site.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """The site that `to_dict` wrote.

        Examples:
            >>> site = Site("act", "act", "relu", channels=4, axis=-1, order=0, positions=2)
            >>> Site.from_dict(site.to_dict()) == site
            True
        """
        fields = dict(data)
        folds = {
            key: tuple(Fold.from_dict(fold) for fold in fields.get(key, ()))
            for key in ("folds", "up_folds", "consumer_folds")
        }
        for key in ("producer", "up"):
            fields[key] = _port(fields[key], 0) if fields.get(key) else None
        fields["options"] = tuple((name, value) for name, value in fields.get("options", ()))
        fields["consumers"] = tuple(_port(port, len(folds["consumer_folds"])) for port in fields.get("consumers", ()))
        return cls(**{**fields, **folds})


def _port(data: dict[str, Any], before: int) -> Port:
    """A port from plain data; where it does not say which constant maps lie before it, all `before` of them do."""
    every = [(index, 0, data["total"]) for index in range(before)]
    folds = tuple((int(index), int(start), int(stop)) for index, start, stop in data.get("folds", every))
    return Port(**{**data, "folds": folds})
