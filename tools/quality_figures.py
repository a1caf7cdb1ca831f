"""What our recipes cost, by model, context and C (docs/quality.md)."""

from frontier_figures import measured, short_name, table
from task_figures import Measured, task_results

from elastickv.evaluation.tasks.paired_scores import SECOND_WORDING
from elastickv.html_report.comparisons.task_scores import mean_difference, solved
from elastickv.results.kinds.evaluation_result import LossRow

LIMITS = (0.002, 0.01, 0.05)


def quality() -> list[str]:
    """Return a table of KL, top-1 and tasks by model, context and C, and the largest C within some losses."""
    every = measured("*/fidelity-*-[0-9]*.json") | measured("*/frontier-*.json")
    results = {(model, context): of for (model, context, exact), of in every.items() if not exact}
    ratios = sorted(
        {row.compress for _, result in results.values() for row in result.rows if row.compress and row.compress > 1}
    )
    answered = task_results()
    losses, chosen = [], []
    for (model, context), (_, result) in sorted(results.items()):
        by_ratio = {row.compress: row for row in result.rows if row.compress and row.context == context}
        cells = [by_ratio.get(ratio) for ratio in ratios]
        name = short_name(model)
        losses.append([name, str(context), *(_cell(row, answered, name) for row in cells)])
        within = [max((ratio for ratio, row in by_ratio.items() if row.kl.high <= limit), default=None) for limit in LIMITS]
        chosen.append(
            [name, str(context), *(f"below C={min(by_ratio):g}" if ratio is None else f"C={ratio:g}" for ratio in within)]
        )
    named = [result for _, result in results.values()]
    texts = sorted({text for result in named for text in result.texts})
    calibrations = sorted({result.calibration.text for result in named if result.calibration})
    return [
        *table(["model", "context", *(f"C={ratio:g}" for ratio in ratios)], losses),
        "",
        "The largest measured C whose KL, with its whole 95 % interval, is at most",
        "",
        *table(["model", "context", *(f"{limit:g}" for limit in LIMITS)], chosen),
        "",
        f"Calibrated on {', '.join(calibrations)}; scored on {', '.join(texts)}, which no calibration has read.",
        *_of_tasks(answered),
    ]


def _cell(row: LossRow | None, answered: Measured, model: str) -> str:
    if row is None:
        return "-"
    tasks = answered.get((model, row.context))
    points = mean_difference(solved(tasks.rows), row.cache) if tasks else None
    return f"{row.kl.mean:.4f} / {row.top1_percent.mean:.1f}{'' if points is None else f' / {points.mean:+.1f}'}"


def _of_tasks(answered: Measured) -> list[str]:
    """Return what stands behind the change of the tasks' scores: how many items, and what other words of the prompts change."""
    lines = []
    for (model, tokens), measured_tasks in answered.items():
        shown = solved(measured_tasks.rows)
        if (words := mean_difference(shown, SECOND_WORDING)) is not None:
            items = " or ".join(map(str, sorted({row.items for row in shown})))
            lines += [
                "",
                f"Tasks of {model} at {tokens} tokens: {len(shown)} with {items} items each. Other words in the prompts alone "
                f"change full attention's score by {words.mean:+.1f} points.",
            ]
    return lines
