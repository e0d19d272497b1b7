"""Code that hides something from an analysis: each network was, or could be, collapsed to another function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn
from torch.nn.utils import prune

import linearize
from linearize.errors import ConvertError
from linearize.surgery.layers import MaskedActivation
from tests.chain import error, outputs, randomize
from tests.toys import image, shaken, vector

Make = Callable[[], nn.Module]

# Name -> the network, its inputs, and what becomes of it: "" if all linear channels go, else a part of the reason
# why there is no gate, or why a channel stays a partial activation.
CASES: dict[str, tuple[Make, Callable[[], Any], str]] = {}


def case(outcome: str, inputs: Callable[[], Any] | None = None) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        CASES[make.__name__] = (make, inputs or vector(), outcome)
        return make

    return register


def net(forward: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    """A module with this forward and these children."""
    model: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def ffn(act: nn.Module | None = None, width: int = 12) -> dict[str, nn.Module]:
    return {"a": nn.Linear(6, width), "act": act or nn.ReLU(), "b": nn.Linear(width, 5)}


def convs(kernel: int = 1, padding: int = 0, act: nn.Module | None = None) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(4, 12, 1), "act": act or nn.ReLU(), "b": nn.Conv2d(12, 5, kernel, padding=padding)}


# -- memory: views, in-place operations, aliases


@case("read again")
def in_place_through_a_view() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(h.unsqueeze(1))
        return self.b(h)

    return net(forward, **ffn(nn.ReLU(inplace=True)))


@case("read again")
def view_made_before_and_read_after() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        view = h.view(-1, 12)
        self.act(h)
        return self.b(view)

    return net(forward, **ffn(nn.ReLU(inplace=True)))


@case("reads what it has overwritten")
def result_of_an_in_place_module_ignored() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(h)
        return self.b(h)

    return net(forward, **ffn(nn.SiLU(inplace=True)))


@case("reads what it has overwritten")
def input_of_an_in_place_module_returned() -> nn.Module:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return self.b(self.act(h)), h

    return net(forward, **ffn(nn.SiLU(inplace=True)))


@case("does other things")
def result_of_an_in_place_function_ignored() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        F.relu(h, inplace=True)
        return self.b(h)

    return net(forward, a=nn.Linear(6, 12), b=nn.Linear(12, 5))


class Overwriting(nn.Module):
    """No attribute says that it works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


@case("has no attribute inplace")
def in_place_without_saying_so() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Overwriting(), nn.Linear(12, 5))


@case("is overwritten", image())
def input_of_the_producer_overwritten() -> nn.Module:
    """If only a merged consumer were left, its input would be the overwritten tensor itself."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        h = self.act(self.a(x))
        x.mul_(2.0)
        return self.b(h.permute(0, 1, 3, 2)), x

    return net(forward, **convs(3))


@case("is also read elsewhere")
def packed_projection_returned() -> nn.Module:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.packed(x)
        a, b = h.chunk(2, -1)
        return self.down(self.act(a) * b), h

    return net(forward, packed=nn.Linear(6, 24), act=nn.GELU(), down=nn.Linear(12, 5))


# -- positions: slices, pads and pools between the maps


@case("", image())
def cropped_before_a_padded_consumer() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x))[:, :, 1:]), **convs(3, 1))


@case("", image())
def cropped_after_the_producer() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x)[:, :, 1:])), **convs(3, 1))


@case("", image())
def two_halves_of_the_image() -> nn.Module:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        up, down = self.act(self.a(x)).chunk(2, 2)
        return self.b(up), self.c(down)

    return net(forward, **convs(3, 1), c=nn.Conv2d(12, 3, 3, padding=1))


@case("", image())
def shifted_by_padding() -> nn.Module:
    """The size is the same before and after, the positions are not."""
    return net(lambda self, x: self.b(F.pad(self.act(self.a(x)), (1, -1))), **convs())


@case("padding adds channels", image())
def channels_shifted_by_padding() -> nn.Module:
    return net(lambda self, x: self.b(F.pad(self.act(self.a(x)), (0, 0, 0, 0, 1, -1))), **convs())


@case("", image())
def pooling_that_is_no_mean() -> nn.Module:
    return net(lambda self, x: self.b(F.avg_pool2d(self.act(self.a(x)), 2, divisor_override=3)), **convs())


@case("", image())
def padded_around_a_bare_product() -> nn.Module:
    """The pad stands in the same forward as a linear product, and does not belong to it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.b(F.pad(self.act(self.a(x)), (1, 1, 1, 1)))
        return F.linear(y.permute(0, 2, 3, 1), self.weight)

    model = net(forward, **convs(3))
    model.weight = nn.Parameter(torch.randn(3, 5))
    return model


@case("", image())
def circular_padding() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1), nn.Tanh(), nn.Conv2d(5, 3, 1))


@case("computes more than a linear map", image())
def wrapped_around() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(12, 5, 1))


@case("does not reach every position", image())
def norm_before_a_padded_consumer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), shaken(nn.BatchNorm2d(12)), nn.Conv2d(12, 5, 3, padding=1))


@case("", image())
def pooled_to_fewer_dimensions() -> nn.Module:
    """A pointwise convolution of two dimensions, then a spatial one of one."""
    return net(
        lambda self, x: self.b(self.act(self.a(x)).flatten(2)),
        a=nn.Conv2d(4, 8, 1),
        act=nn.GELU(),
        b=nn.Conv1d(8, 3, 2),
    )


# -- code that looks at the width, the type or the bits


@case("computes with the number")
def scaled_by_the_width() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        return self.b(h * h.shape[-1] ** -0.5)

    return net(forward, **ffn())


@case("computes with the number")
def scaled_by_an_attribute() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x))) / self.a.out_features, **ffn())


@case("another shape", vector(batch=4))
def folded_into_the_batch() -> nn.Module:
    """At half the width, two rows would become one."""
    return net(lambda self, x: self.b(self.act(self.a(x)).view(-1, 12)), **{**ffn(), "b": nn.Linear(12, 3)})


@case("is cast to")
def rounded_on_the_way() -> nn.Module:
    return net(lambda self, x: self.b((self.act(self.a(x)) * 8).to(torch.int32).to(x.dtype)), **ffn())


@case("reads the bits")
def read_as_bits() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x)).view(torch.int64).view(torch.float64)), **ffn())


@case("something else than its input")
def only_its_type_and_shape() -> nn.Module:
    """The second linear map does not read the activation at all."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        return self.b(self.c(x).type_as(h).view_as(h)) + self.d(h)

    return net(forward, **ffn(), c=nn.Linear(6, 12), d=nn.Linear(12, 5))


@case("")
def asks_for_a_tensor() -> nn.Module:
    """Symbolic tracing takes the other branch; the source does not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h * 3 if isinstance(x, Tensor) else h)

    return net(forward, a=nn.Linear(6, 12), b=nn.Linear(12, 5))


@case("in training mode")
def draws_random_numbers_in_training() -> nn.Module:
    """A traced forward would draw them once and for all; the source does not. A narrower layer would not fit them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + torch.randn(12) if self.training else h)

    return net(forward, a=nn.Linear(6, 12), b=nn.Linear(12, 5))


# -- activations with parameters, activations in several places


@case("parameters of its own per channel")
def slopes_per_channel() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.PReLU(12), nn.Linear(12, 5))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.gelu(x)


@case("parameters of its own per channel")
def weights_per_channel() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Weighted(), nn.Linear(12, 5))


@case("a function of other tensors")
def slope_as_an_argument() -> nn.Module:
    model = net(lambda self, x: self.b(F.prelu(self.a(x), self.slope)), a=nn.Linear(6, 12), b=nn.Linear(12, 5))
    model.slope = nn.Parameter(torch.rand(12))
    return model


class Borrowing(nn.Module):
    """It is handed the activation by its caller."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        return self.b(act(self.a(x)))


@case("called on different inputs")
def one_activation_on_two_widths() -> nn.Module:
    return net(lambda self, x: self.v(self.u(x, self.act), self.act), u=Borrowing(12), v=Borrowing(20), act=nn.ReLU())


@case("runs more than once")
def one_activation_lent_twice() -> nn.Module:
    return net(lambda self, x: self.v(self.u(x, self.act), self.act), u=Borrowing(12), v=Borrowing(12), act=nn.ReLU())


@case("")
def one_activation_in_two_blocks() -> nn.Module:
    """Registered in both: each gets a gate of its own."""
    act = nn.GELU()
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, w), act, nn.Linear(w, 6)) for w in (12, 20)))


@case("where the capture cannot look")
def called_under_autocast_too() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        with torch.autocast("cpu", enabled=False):
            return self.d(self.act(self.c(y)))

    return net(forward, **ffn(), c=nn.Linear(5, 9), d=nn.Linear(9, 4))


@case("")
def activations_as_attributes() -> nn.Module:
    model = net(lambda self, x: self.c(self.leaky(self.b(self.act(self.a(x))))), a=nn.Linear(6, 12), b=nn.Linear(12, 9))
    model.c = nn.Linear(9, 2)
    model.act, model.leaky = F.gelu, functools.partial(F.leaky_relu, negative_slope=0.3)  # type: ignore[assignment]
    return model


@case("")
def called_by_keyword() -> nn.Module:
    return net(lambda self, x: self.b(input=self.act(input=self.a(input=x))), **ffn(nn.GELU()))


@case("holds it in another place")
def activation_called_from_a_list() -> nn.Module:
    """A gate in the attribute would never be called."""
    model = net(lambda self, x: self.b(self.steps[1](self.steps[0](x))), **ffn())
    model.steps = [model.a, model.act]  # type: ignore[assignment]
    return model


@case("calls a from another place")
def linear_map_called_from_a_list() -> nn.Module:
    model = net(lambda self, x: self.b(self.act(self.steps[0](x))), **ffn())
    model.steps = [model.a]  # type: ignore[assignment]
    return model


@case("put on the object")
def forward_of_one_object() -> nn.Module:
    model = net(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 12), b=nn.Linear(12, 5))
    model.forward = functools.partial(lambda self, x: self.b(F.relu(self.a(x))), model)
    return model


@case("")
def pruned_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.4)
    return model


# -- modules that are not what they seem


@case("computes more than a linear map")
def scaled_product() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2)

    return nn.Sequential(Scaled(6, 12), nn.ReLU(), Scaled(12, 4))


@case("", image())
def geometry_in_the_forward() -> nn.Module:
    """The attributes of one say another stride than its forward; the other has none."""

    class Strided(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight, self.bias, 2, 1)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 12, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, stride=2)

    return nn.Sequential(Strided(4, 12, 3), nn.ReLU(), Bare())


@case("computes more than a linear map")
def returns_a_tuple() -> nn.Module:
    class Tupled(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return (super().forward(input),)

    return net(lambda self, x: self.b(self.act(self.a(x)[0]))[0], a=Tupled(6, 12), act=nn.ReLU(), b=Tupled(12, 5))


@case("the code around it")
def takes_more_arguments() -> nn.Module:
    class Flagged(nn.Linear):
        def forward(self, input: Tensor, flag: bool = False) -> Tensor:
            return super().forward(input)

    return net(lambda self, x: self.b(self.act(self.a(x, flag=True))), **{**ffn(), "a": Flagged(6, 12)})


@case("has a hook")
def watched() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    model[0].register_forward_hook(lambda module, args, out: None)
    return model


@case("scales or pads")
def changed_by_a_hook() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


@case("shared with")
def overlapping_weights() -> nn.Module:
    """The second weight is a window into the first."""
    small, large = nn.Linear(6, 6).double(), nn.Linear(6, 16).double()
    small.weight = nn.Parameter(large.weight.data[3:9])
    return nn.Sequential(small, large, nn.ReLU(), nn.Linear(16, 5))


@case("shared with")
def registered_twice() -> nn.Module:
    model = net(lambda self, x: self.other(self.act(self.a(x))), **ffn())
    model.other = model.b
    return model


@case("shared with")
def weight_is_an_output() -> nn.Module:
    return net(lambda self, x: (self.b(self.act(self.a(x))), self.a.weight.square().sum()), **ffn())


@case("is called 2 times")
def one_norm_for_two_layers() -> nn.Module:
    return net(
        lambda self, x: self.c(F.relu(self.norm(self.b(self.act(self.norm(self.a(x))))))),
        a=nn.Linear(6, 12),
        act=nn.ReLU(),
        norm=shaken(nn.BatchNorm1d(12)),
        b=nn.Linear(12, 12),
        c=nn.Linear(12, 5),
    )


@case("")
def slices_of_a_sequential() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4))
    return net(lambda self, x: self.layers[3:](self.layers[:3](x)), layers=layers)


@case("")
def lists_and_dicts() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        for name, layer in zip(("relu", "gelu"), reversed(self.layers), strict=True):
            x = self.acts[name](layer(x))
        return self.out(x)

    layers, acts = (
        nn.ModuleList([nn.Linear(12, 6), nn.Linear(6, 12)]),
        nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU()}),
    )
    return net(forward, layers=layers, acts=acts, out=nn.Linear(6, 2))


@case("it is an output of the model")
def hidden_tensor_inside_an_object() -> nn.Module:
    class Seen:
        def __init__(self, hidden: Tensor) -> None:
            self.hidden = hidden

    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        h = self.act(self.a(x))
        return {"y": self.b(h), "seen": Seen(h)}

    return net(forward, **ffn())


@case("", lambda: torch.randn(4, 9, 9))
def images_without_a_batch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 3, 1))


@case("", vector(batch=1))
def a_batch_of_one() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x)).squeeze(0).unsqueeze(0)), **ffn())


@case("", vector(batch=6))
def a_batch_as_large_as_the_width() -> nn.Module:
    return net(lambda self, x: self.b(self.act(self.a(x)).reshape(6, -1)), **ffn(width=6))


def converted(model: nn.Module, x: Tensor) -> tuple[nn.Module | None, str]:
    """The model with gates, or why it gets none."""
    try:
        return linearize.convert(model, x), ""
    except ConvertError as refusal:
        return None, str(refusal)


def reasons(model: nn.Module) -> list[str]:
    return [site.reason for site in linearize.summary(model).sites if site.reason]


@pytest.mark.filterwarnings("ignore:torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(("share", "when"), [(0.5, "always"), (1.0, "cheaper")])
@pytest.mark.parametrize("name", CASES)
def test_function_stays(name: str, share: float, when: Any, caplog: pytest.LogCaptureFixture) -> None:
    make, inputs, outcome = CASES[name]
    torch.manual_seed(len(name))
    model, x = make().double().eval(), inputs().double()
    original = outputs(model, x.clone())
    gated, refusal = converted(model, x.clone())
    if gated is None:
        assert outcome
        assert outcome in refusal
        return
    assert all(torch.equal(a, b) for a, b in zip(original, outputs(gated, x.clone()), strict=True))
    randomize(gated, share)
    moved = outputs(gated, x.clone())
    collapsed = linearize.collapse(gated, when=when)
    assert error(moved, outputs(collapsed, x.clone())) <= 1e-12
    masked = any(isinstance(module, MaskedActivation) for module in collapsed.modules())
    if not outcome:
        assert error(original, moved) > 1e-10
        assert not masked
        assert not reasons(gated)
    else:
        assert masked or linearize.summary(gated).linear == 0
        assert any(outcome in text for text in [*reasons(gated), caplog.text])
