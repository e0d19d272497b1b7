"""The same share of linear channels at four moments of training, with the same budget and the same pace."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.papers.runs import Plain
from benchmarks.papers.training import TRAINED, Task, Trainer, apply_masks, fitted, impose

__all__ = ["CONTROL", "MOMENTS", "moments"]

# Share of the training steps that is over when channels become linear.
MOMENTS = {"at the start": 0.0, "early": 0.15, "midway": 0.4, "trained": TRAINED}
CONTROL = "late choice, at the start"


def moments(task: Task, steps: int, shares: Sequence[float], names: Sequence[str], *, control: bool) -> Plain:
    """Train once without linear channels, then from each moment on with each share of them.

    Args:
        task: what to train.
        steps: of training in all, for every network.
        shares: of linear channels.
        names: keys of `MOMENTS`.
        control: also the channels that the trained network would choose, but from the start on: whether it is the
            choice that matters, or the moment.

    Returns:
        "dense": scores of the network that stays nonlinear, "trained": its scores when it counts as trained, "rows":
        moment, share, "at once" (the score right after the channels became linear) and the scores at the end.
    """
    trainer = Trainer(task, steps)
    taken = {}
    for name, place in MOMENTS.items():
        trainer.until(round(place * steps))
        taken[name] = trainer.snapshot()
    trained = task.score(task.model)
    trainer.until(steps)
    result: Plain = {"trained": trained, "dense": task.score(task.model), "rows": []}
    late: dict[float, dict[str, Tensor]] = {}
    for name in sorted(names, key=lambda name: -MOMENTS[name]):  # the trained network's choice first: the control's
        for share in shares:
            trainer.restore(taken[name])
            masks = impose(task, share)
            late.setdefault(share, masks)
            at_once = _first(task.score(task.model)) if name == "trained" else None
            trainer.until(steps)
            result["rows"].append({"moment": name, "share": share, "at once": at_once, **task.score(task.model)})
    for share in shares if control else ():
        trainer.restore(taken["at the start"])
        fitted(task)
        apply_masks(task.model, late[share])
        trainer.until(steps)
        result["rows"].append({"moment": CONTROL, "share": share, "at once": None, **task.score(task.model)})
    return result


def _first(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))
