"""The same share of linear channels at four moments of training, with the same budget and the same pace."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.papers.training import TRAINED, Task, Trainer, apply_masks, fitted, impose
from benchmarks.runs import Plain

__all__ = ["CROSSED", "MOMENTS", "moments"]

# Share of the training steps that is over when channels become linear.
MOMENTS = {"at the start": 0.0, "early": 0.15, "midway": 0.4, "trained": TRAINED}
# Channels chosen at another moment than the one at which they become linear: moment, and moment of the choice.
CROSSED = {
    "late choice, at the start": ("at the start", "trained"),
    "first choice, trained": ("trained", "at the start"),
}


def moments(
    task: Task, steps: int, shares: Sequence[float], names: Sequence[str], *, control: bool, led: bool = False
) -> Plain:
    """Train once without linear channels, then from each moment on with each share of them.

    Args:
        task: what to train.
        steps: of training in all, for every network.
        shares: of linear channels.
        names: keys of `MOMENTS`.
        control: also the channels that the trained network would choose from the start on, and those of the start
            when it is trained: is it the choice that matters, or the moment?
        led: a prior leads the channels to their lines, instead of at once.

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
    chosen: dict[tuple[str, float], dict[str, Tensor]] = {}
    for name in names:
        for share in shares:
            trainer.restore(taken[name])
            if led:
                trainer.lead(share)
            else:
                chosen[name, share] = impose(task, share)
            result["rows"].append(_row(trainer, name, share))
    for name, (moment, choice) in CROSSED.items() if control else ():
        for share in shares:
            trainer.restore(taken[moment])
            fitted(task)
            apply_masks(task.model, chosen[choice, share])
            result["rows"].append(_row(trainer, name, share))
    return result


def _row(trainer: Trainer, moment: str, share: float) -> Plain:
    """The score now, and the scores when the budget is spent."""
    at_once = next(iter(trainer.task.score(trainer.task.model).values()))
    trainer.until(trainer.steps)
    return {"moment": moment, "share": share, "at once": at_once, **trainer.task.score(trainer.task.model)}
