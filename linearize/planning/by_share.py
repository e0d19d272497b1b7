"""Compress to a share of linear channels: channels compete, the most linear ones are chosen, and training continues."""

from __future__ import annotations

from linearize.calibrate import calibrate
from linearize.collapse import collapse
from linearize.convert import check_gated
from linearize.plan import When
from linearize.planning.job import Job, Made
from linearize.surgery.form_choice import make_plan
from linearize.training.distance import check_seen
from linearize.training.priors import SparsityPrior

__all__ = ["to_share"]


def to_share(job: Job, linear: float, when: When) -> Made:
    """Make a share of all gated channels linear, with or without training, and collapse."""
    steps, gated = job.steps, job.gated
    check_gated(gated)
    with steps("calibrate"):
        calibration = calibrate(gated, job.data, progress=steps.bars)
    prior = SparsityPrior(gated, kind="target", target=linear, steps=job.deciding_steps, calibration=calibration)
    history: list[dict[str, float]] = []
    with steps("fine-tune"):
        if job.training_steps:
            history = job.train(gated, prior, {**job.options, **job.store.training("a share")})
        else:
            prior.step()
    with steps("collapse"):
        plan = make_plan(gated, when=when)
        small = collapse(gated, when=when).eval()
    check_seen(job.original, small, job.data)
    return Made(gated, small, plan, history)
