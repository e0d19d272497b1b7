"""The decision for a budget as a file. An interrupted run continues from it with the same plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from linearize.checks import is_number, is_whole
from linearize.errors import CheckpointError
from linearize.families.option import SiteChoice
from linearize.gating.gate import gates
from linearize.plan import Plan
from linearize.report.budget import Outcome
from linearize.report.trial import Trial
from linearize.storage.folders import write_text

__all__ = ["DECISION_FILE", "Decision"]

DECISION_FILE = "plan.json"

_FORMAT = "linearize-decision-1"
_WORDS: Mapping[str, Any] = {"measure": str, "met": bool | None, "runtime": str | None, "at": str, "parts": tuple}
"""Fields of an outcome that are no numbers, and what they are."""


@dataclass(frozen=True)
class Decision:
    """The plan for a budget, and what the report says about it.

    Attributes:
        plan: of the collapsing.
        choices: what happens to each site or module that does not stay as it is.
        outcome: what became of the budget.
        options: by group of sites, the best options as a table.
        notes: what else a reader should know.
        trials: the plans that were tried.
    """

    plan: Plan
    choices: tuple[SiteChoice, ...]
    outcome: Outcome
    options: Mapping[str, str]
    notes: tuple[str, ...]
    trials: tuple[Trial, ...] = ()

    @property
    def by_site(self) -> dict[str, SiteChoice]:
        """The choices by the name of their site or module."""
        return {choice.site: choice for choice in self.choices}

    def told(self) -> dict[str, Any]:
        """The fields of the report that this decision fills."""
        told = {"outcome": self.outcome, "options": dict(self.options), "notes": tuple(self.notes)}
        return {**told, "trials": self.trials}

    def write(self, path: Path, key: str) -> None:
        """Write it, completely or not at all, with what identifies the job.

        Raises:
            CheckpointError: it cannot be written.
        """
        content = {
            "key": key,
            "plan": self.plan.to_json(),
            "choices": [asdict(choice) for choice in self.choices],
            "outcome": self.outcome.to_dict(),
            "options": dict(self.options),
            "notes": list(self.notes),
            "trials": [asdict(trial) for trial in self.trials],
        }
        whole = {"format": _FORMAT, "sha256": _checksum(content), "decision": content}
        write_text(path, json.dumps(whole, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, key: str) -> Decision | None:
        """Read the decision of the same job; None if there is none, or it is of another job.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            if not path.exists():
                return None
            whole = json.loads(path.read_text(encoding="utf-8"))
            content = whole["decision"]
            if whole["format"] != _FORMAT or whole["sha256"] != _checksum(content):
                raise _damaged(path, "its checksum is not that of its content")
            if content["key"] != key:
                return None
            return cls(
                Plan.from_json(content["plan"]),
                tuple(_choice(entry) for entry in content["choices"]),
                _outcome(content["outcome"]),
                {str(name): str(text) for name, text in content["options"].items()},
                tuple(map(str, content["notes"])),
                tuple(Trial(**entry).checked() for entry in content.get("trials", ())),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise _damaged(path, f"it is no plan ({type(error).__name__})") from error

    def checked(self, model: nn.Module) -> Decision:
        """Check that it belongs to this gated model, and give it back.

        Raises:
            CheckpointError: it names what the model does not have.
        """
        named = gates(model)
        modules = {path for path, _ in model.named_modules()}
        for choice in self.choices:
            gate = named.get(choice.site)
            if gate is None and choice.site not in modules:
                raise _damaged(Path(choice.site), f"the model has no {choice.site!r}")
            if gate is not None and choice.keep > gate.channels:
                raise _damaged(Path(choice.site), f"{choice.site!r} has {gate.channels} channels, not {choice.keep}")
        if {site.site for site in self.plan.sites} - set(named) - modules:
            raise _damaged(Path(DECISION_FILE), "its plan is of another model")
        return self


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), found, "It is made again.")


def _choice(entry: Mapping[str, Any]) -> SiteChoice:
    made = SiteChoice(**{**entry, "gone": tuple(entry.get("gone", ()))})
    if not isinstance(made.site, str) or not isinstance(made.form, str):
        raise TypeError("no name of a site or of a form")
    if not all(is_whole(value) and value >= 0 for value in (made.keep, made.rank, *made.gone)):
        raise ValueError("no counts")
    return made


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    made = Outcome(**{**entry, "parts": tuple(_outcome(part) for part in entry.get("parts", ()))})
    for field in fields(Outcome):
        value = getattr(made, field.name)
        fits = value is None or is_number(value)
        if field.name in _WORDS:
            fits = isinstance(value, _WORDS[field.name])
        if not fits:
            raise TypeError(f"{field.name} is a {type(value).__name__}")
    return made
