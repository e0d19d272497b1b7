"""Are the classes linearly separable? Tested layer by layer; a cheap sign of where nonlinearity is still needed.

Two point sets A and B can be separated by a hyperplane if and only if their Minkowski difference `A - B` lies in an
open half-space: `w (a - b) > 0` for all a and b. A linear classifier without errors on the points is such a `w`.
Shape letters: N samples, D features, K classes.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linearize.analysis.canvas import FIRST, NAMED_ROWS, SECOND, head, new_figure, write_picture
from linearize.convert import convert, eager_model
from linearize.errors import DataError, UsageError
from linearize.gating.gate import gates
from linearize.graph.capture import normalize_inputs, tensors_of
from linearize.running.models import call, device_of, evaluating, move
from linearize.text_table import render

__all__ = ["LayerSeparability", "Separability", "class_separability"]


@dataclass(frozen=True)
class LayerSeparability:
    """The separability of the classes at one place of a model.

    Attributes:
        name: "input", the name of a site (behind its activation), or "output".
        features: D.
        accuracy: of linear classifiers, one class against the rest, on the points themselves: mean over classes.
        separable: how many classes a hyperplane separates from the rest without error.
        classes: K.
        margin: the least distance of a point from its separating hyperplane, over the separable classes, in standard
            deviations of the features; None if no class is separable.
        trivial: there are no more points than D + 1, which a hyperplane can separate whatever their classes.
    """

    name: str
    features: int
    accuracy: float
    separable: int
    classes: int
    margin: float | None
    trivial: bool


@dataclass(frozen=True)
class Separability:
    """Linear separability of the classes: a row for each layer, from the input to the output. It prints as a table."""

    layers: tuple[LayerSeparability, ...]

    def __getitem__(self, name: str) -> LayerSeparability:
        return next(layer for layer in self.layers if layer.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of accuracy and separable classes, layer by layer."""
        draw_separability(self, path, title)

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.features,
                f"{layer.accuracy:.4f}",
                f"{layer.separable} of {layer.classes}" + (" (few points)" if layer.trivial else ""),
                None if layer.margin is None else f"{layer.margin:.3g}",
            )
            for layer in self.layers
        ]
        return render(("layer", "features", "accuracy", "separable", "margin"), rows)


def class_separability(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    features: Literal["mean", "flatten"] = "mean",
    limit: int = 2048,
    seed: int = 0,
) -> Separability:
    """Linear separability of the classes at the input, behind every activation site, and at the output.

    At each place, scikit-learn's linear support vector machine is fitted for every class against the rest, on
    standardised features, nearly without regularisation. No error on the points proves that the class is separable.
    An error only means that no hyperplane was found, because the solver stops at some point.

    Args:
        model: plain or converted. It is not changed.
        inputs: one batch of N samples: a tensor, a tuple or a dict of keyword arguments.
        labels: (N,), the class of each sample. There must be at least two classes.
        features: "mean" averages every channel over its positions. "flatten" takes each position as a feature.
        limit: if there are more features, they are projected at random to this number. If classes are separable after
            the projection, they are separable.
        seed: of that projection.

    Raises:
        UsageError: labels do not fit the samples, scikit-learn is missing, or the model does not run on the inputs.
        CaptureError: the model cannot be captured.
        DataError: NaN or infinity turns up.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
        >>> class_separability(net, x, torch.tensor([0, 0, 1, 1, 0]))["input"].separable
        0
    """
    if features not in ("mean", "flatten"):
        raise UsageError("features", f"found {features!r}", 'Pass "mean" or "flatten".')
    places = _features(model, inputs, flatten=features == "flatten")
    targets = torch.as_tensor(labels).cpu()
    samples = len(places["input"])
    if targets.dim() != 1 or len(targets) != samples:
        raise UsageError("labels", f"found shape {tuple(targets.shape)} for {samples} samples", "Pass one for each.")
    if len(targets.unique()) < 2:
        raise UsageError("labels", "found a single class", "Pass samples of at least two classes.")
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for name, points in places.items():
        if not bool(points.isfinite().all()):
            raise DataError(name, "found NaN or infinity here", "Check the samples, and the weights before this place.")
        if points.shape[1] > limit:
            projection = torch.randn(points.shape[1], limit, generator=generator, dtype=points.dtype)
            points = points @ projection / limit**0.5  # noqa: PLW2901
        layers.append(_separate(name, points, targets))
    return Separability(tuple(layers))


def _features(model: nn.Module, inputs: Any, *, flatten: bool) -> dict[str, Tensor]:
    """Features (N, D) in float64 at each place, in order of execution."""
    twin = copy.deepcopy(eager_model(model))
    batch = move(normalize_inputs(inputs), device_of(twin))
    if not gates(twin):
        args, kwargs = batch
        twin = convert(twin, kwargs if kwargs and not args else args, inplace=True)
    given = [t for t in tensors_of([batch[0], batch[1]]) if t.dim()]
    if not given:
        raise UsageError("inputs", "found no tensor with samples", "Pass one batch of samples.")
    places: dict[str, Tensor] = {"input": given[0].detach().flatten(1).cpu().double()}

    def watch(name: str, axis: int) -> Callable[..., None]:
        def note(_module: Any, _args: Any, output: Tensor) -> None:
            moved = output.detach().movedim(axis, -1).flatten(1, -2) if output.dim() > 2 else output.detach()[:, None]
            places[name] = (moved.flatten(1) if flatten else moved.mean(1)).cpu().double()

        return note

    with ExitStack() as stack, evaluating(twin):
        for name, gate in gates(twin).items():
            stack.callback(gate.register_forward_hook(watch(name, gate.axis)).remove)
        outputs = [t for t in tensors_of(call("model", twin, batch)) if t.is_floating_point()]
    if outputs:
        places["output"] = outputs[0].flatten(1).cpu().double()
    return places


def _separate(name: str, points: Tensor, labels: Tensor) -> LayerSeparability:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise UsageError("separability", "scikit-learn is not installed", "pip install 'linearize[data]'") from error
    spread = points.std(0)
    points = (points - points.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    classes = labels.unique()
    accuracies: list[float] = []
    margins: list[float] = []
    for label in classes if len(classes) > 2 else classes[:1]:
        signs = torch.where(labels == label, 1.0, -1.0).double()
        machine = LinearSVC(C=1e4, dual="auto", tol=1e-6, max_iter=5000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            machine.fit(points.numpy(), signs.numpy())
        weight = torch.from_numpy(machine.coef_[0])
        distances = signs * (points @ weight + float(machine.intercept_[0])) / weight.norm().clamp_min(1e-300)
        accuracies.append(float((distances > 0).double().mean()))
        if bool((distances > 0).all()):
            margins.append(float(distances.min()))
    whole = len(classes) == 2
    return LayerSeparability(
        name=name,
        features=points.shape[1],
        accuracy=sum(accuracies) / len(accuracies),
        separable=len(margins) * (2 if whole else 1),
        classes=len(classes),
        margin=min(margins) if margins else None,
        trivial=len(points) <= points.shape[1] + 1,
    )


def draw_separability(found: Separability, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the accuracy of linear classifiers and the share of separable classes, layer by layer.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    layers = found.layers
    figure, (axes,) = new_figure((max(5, 2 + 0.32 * min(len(layers), NAMED_ROWS)), 3.4), 1)
    places = range(len(layers))
    accuracy = [100 * layer.accuracy for layer in layers]
    axes.plot(places, accuracy, color=FIRST, marker="o", markersize=4, label="accuracy of linear classifiers")
    separable = [100 * layer.separable / layer.classes for layer in layers]
    axes.plot(places, separable, color=SECOND, marker="s", markersize=4, linestyle="--", label="separable classes")
    if len(layers) <= NAMED_ROWS:
        axes.set_xticks(places, [layer.name for layer in layers], fontsize=7, rotation=90)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("%")
    axes.legend(fontsize=8, frameon=False)
    head(axes, title, f"{layers[-1].separable} of {layers[-1].classes} classes separable at the output")
    write_picture(figure, path)
