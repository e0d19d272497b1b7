"""A real sentence encoder to a budget, in closed form: all-MiniLM-L6-v2 with its FFNs at 50, 33 and 25% of their FLOPs.

    python benchmarks/minilm_budget.py [--budgets 0.5 0.333 0.25] [--calibrate 1500] [--test 1000] [--threads 1]

Nothing is trained. Ways to the same FLOPs, all on the same sentences (see minilm.py for where they come from):

- magnitude: in every layer the channels with the largest product of the norms of their row and column stay;
- magnitude + refit: the same channels, the layer that reads them refitted by least squares;
- removal + refit: channels chosen by optimal-brain-surgeon scores, in the metric of the output's sensitivity, refitted;
  equally many in every layer;
- plan: what `linearize.compress(flops=...)` chooses, layer by layer, among these and linear skips;
- plan, sequential: each layer refitted once more behind those that are compressed already.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import minilm  # type: ignore[import-not-found]
import torch
from torch import nn

import linearize
from linearize.collapse import collapse
from linearize.cost import cost
from linearize.families.option import SiteChoice
from linearize.planning.budget import Budget
from linearize.planning.carry_out import edited, planned, site_choices
from linearize.planning.sequential import edited_in_order
from linearize.planning.settle import settle
from linearize.planning.survey import Survey
from linearize.planning.surveying import Wanted, survey
from linearize.report.timing import environment, write_json
from linearize.text_table import render

HERE = Path(__file__).resolve().parent


def by_magnitude(found: Survey, keep: int, *, refit: bool) -> nn.Module:
    """Equally many channels in every layer, those of the largest weights."""
    chosen, choices = {}, {}
    for name, curve in found.places["channels"].curves.items():
        site = curve.observation.site
        if site.producer is None:
            continue
        up: Any = found.gated.get_submodule(site.producer.module)
        size = up.weight.detach().double().norm(dim=1) * curve.weight.norm(dim=0)
        chosen[name] = size.topk(keep).indices.sort().values
        choices[name] = SiteChoice(name, keep)
    model = edited(found, choices, chosen)
    if not refit:
        for name, curve in found.places["channels"].curves.items():
            down: Any = model.get_submodule(curve.observation.consumers[0].port.module)
            mask = torch.zeros(curve.channels, dtype=torch.bool)
            mask[chosen[name]] = True
            with torch.no_grad():
                down.weight.copy_(curve.weight * mask)
                down.bias.copy_(curve.bias)
    return collapse(model).eval()


def by_removal(found: Survey, keep: int) -> nn.Module:
    """Equally many channels in every layer, chosen and refitted in closed form."""
    return collapse(edited(found, {name: SiteChoice(name, keep) for name in found.places["channels"].curves})).eval()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ways at all budgets."""
    source, texts = minilm.sentences()
    tokenizer, original = minilm.load_original()
    known = minilm.batches(tokenizer, texts[: options.calibrate])
    test = minilm.batches(tokenizer, texts[options.calibrate : options.calibrate + options.test])
    reference = minilm.embed(original, test)
    gated = linearize.convert(original, known[0], exclude="pooler.*")
    batch = known[0]
    start = time.perf_counter()
    found = survey(original, gated, known, batch, Wanted("flops", modules=False), progress=False)  # FFNs are compared
    seconds = time.perf_counter() - start
    ffn = sum(group.stay.flops for group in found.groups)
    rows, models = [], {"original": original}
    for share in options.budgets:
        keep = round(share * next(iter(found.places["channels"].curves.values())).channels / 8) * 8
        budget = Budget("flops", 1 - (1 - share) * ffn / found.total)
        settled = settle(found, budget, batch)
        choices = site_choices(settled.choice)
        behind = edited_in_order(found, choices, known, progress=False)
        ways = {
            "magnitude": by_magnitude(found, keep, refit=False),
            "magnitude + refit": by_magnitude(found, keep, refit=True),
            "removal + refit": by_removal(found, keep),
            "plan": settled.small,
            "plan, sequential": collapse(behind, plan=planned(behind, choices)).eval(),
        }
        models[f"plan, FFN {share:.0%}"] = settled.small
        models[f"removal + refit, FFN {share:.0%}"] = ways["removal + refit"]
        for way, model in ways.items():
            facts = minilm.compare(reference, minilm.embed(model, test))
            of_ffn = 1 - (found.total - cost(model, batch).flops) / ffn
            rows.append({"share": share, "way": way, "ffn_flops": of_ffn, **facts})
        rows[-2]["choices"] = [str(choice) for choice in choices.values()]
        rows[-2]["predicted_loss"] = settled.choice.loss
    speed = minilm.like_batch(test, 32, 32)
    timing = linearize.benchmark(models, speed, rounds=options.rounds, batch_sizes=[1, 32], threads=options.threads)
    facts = environment(torch.device("cpu"), torch.float32)
    told = {"sentences": source, "seconds_survey": seconds, "environment": facts}
    return {**told, "rows": rows, "latency": timing.to_dict()}


def table(found: dict[str, Any]) -> str:
    """A row per budget and way."""
    rows = [
        (
            f"{row['share']:.0%}",
            row["way"],
            f"{row['ffn_flops']:.3f}",
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_5th_percentile']:.3f}",
            f"{row['same_nearest']:.0%}",
        )
        for row in found["rows"]
    ]
    ratios = [
        (r["model"], r["batch_size"], f"{r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]")
        for r in found["latency"]["ratios"]
    ]
    first = render(["FFN", "way", "FLOPs of FFN", "cosine", "5th pct", "nearest"], rows)
    return first + "\n\n" + render(["model", "batch", "latency [quartiles]"], ratios)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 1 / 3, 0.25])
    parser.add_argument("--calibrate", type=int, default=1500, help="sentences to calibrate on")
    parser.add_argument("--test", type=int, default=1000, help="sentences to compare embeddings on")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "minilm_budget.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(table(found))
    write_json(options.json, found)


if __name__ == "__main__":
    main()
