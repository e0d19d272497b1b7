"""The family "modules": one linear map replaces a whole module, such as attention or a residual block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from linearize.families.enclosing import meddled
from linearize.families.family import Context, Family, Layers, Replayed
from linearize.families.modules.apply import replace_wholes
from linearize.families.modules.collect import ModuleCollector
from linearize.families.modules.find import wholes_of
from linearize.families.modules.fit import fit_whole
from linearize.families.modules.options import WHOLE_MODULE, with_modules
from linearize.families.modules.place import Whole
from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.gating.groups import groups_of
from linearize.plan import Form, SitePlan
from linearize.running.models import device_of
from linearize.running.passes import Collector
from linearize.surgery.specs import build

__all__ = ["Modules"]


def _told(keep: int, rank: int) -> str:
    return f"the whole of it one linear map of rank {rank}" if rank else "gone with its module"


class Modules(Family):
    """Its places are modules, by path. Sites inside a module are replaced together with it."""

    name = "modules"
    forms: tuple[Form, ...] = (Form(WHOLE_MODULE, _told),)

    def find(self, context: Context) -> dict[str, Whole]:
        """Find modules that map one tensor to one tensor, outermost first."""
        context.told += _hooked(context.gated)
        if not context.modules or context.tied or context.measure == "activations":
            return {}
        return {whole.path: whole for whole in wholes_of(context.gated, context.batch, groups_of(context.gated))}

    def collectors(self, context: Context, places: Mapping[str, Whole]) -> Sequence[Collector]:
        """Covariances of input and output."""
        device = device_of(context.gated)
        return [ModuleCollector(whole, device) for whole in places.values()]

    def options(self, context: Context, places: Mapping[str, Whole], groups: Sequence[Group]) -> list[Group]:
        """A group for each module, which encloses the groups of its sites."""
        if not places:
            return list(groups)
        wholes = list(places.values())
        return with_modules(groups, wholes, context.gated, context.some, progress=context.progress)

    def layers(self, model: nn.Module, places: Mapping[str, Whole], group: Group, option: Option) -> Layers:
        """The linear map that would replace the module."""
        whole = places[group.sites[0]]
        old = model.get_submodule(whole.path)
        like = next(parameter for parameter in old.parameters() if parameter.is_floating_point())
        layer = build(whole.spec, old).to(like.device, like.dtype)
        return Layers({whole.path: layer}, str(whole.spec), whole.keyword)

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: Mapping[str, Whole],
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Replace modules by their maps. If one map only feeds the next one, the two become one."""
        wholes = [whole for path, whole in places.items() if path in choices and choices[path].rank]
        replace_wholes(model, [(whole, fit) for whole in wholes if (fit := fit_whole(whole)) is not None])

    def replay(self, places: Mapping[str, Whole], site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """Read the map of a module from a plan, to fit it again; or that a site is replaced with its module."""
        inside = any(site.site.startswith(f"{path}.") for path in places)
        if gate is None and site.site not in places and not (inside and not site.rank):
            return None
        return Replayed(SiteChoice(site.site, 0, site.rank, site.form))


def _hooked(gated: nn.Module) -> list[str]:
    """A note about what hooks take away, if there are any."""
    found = meddled(gated)
    if not found:
        return []
    some = "; ".join(f"{path or 'the model'} has {what}" for path, what in list(found.items())[:2])
    more = f" (and {len(found) - 2} more modules)" if len(found) > 2 else ""
    return [f"{some}{more}: what would be lost with a module or the modules around it stays as it is"]
