"""The section on tasks: scores of caches beside full attention on the same items."""

from elastickv.html_report.charts.task_charts import task_bits_chart, task_chart
from elastickv.html_report.comparisons.task_scores import LEAST_PERCENT, compared_tasks
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import ReportData
from elastickv.results.formats.task_table import HEADERS, task_cells


def tasks(data: ReportData) -> Section:
    """Return what models answer with each cache."""
    compared = compared_tasks(data.evaluations)
    rows = (
        {"model": each.model, **dict(zip(HEADERS, cells, strict=True)), "source": task.source}
        for each in compared
        for task in each.rows
        for cells in task_cells([task])
    )
    return Section(
        "tasks",
        "Tasks",
        "RULER's synthetic tasks and others, scored by string match, and questions of files. Differences are to full "
        "attention on the same items; full attention on a second wording of the prompts shows what the words alone change. "
        f"Means by bits are over tasks of which full attention solves at least {LEAST_PERCENT} %.",
        charts=[
            chart
            for number, each in enumerate(compared, 1)
            for chart in (task_chart(number, each), *task_bits_chart(number, each))
        ],
        tables=tables(
            "Scores of tasks, with 95 % intervals over items", rows, ("model", "task", "cache", "worse / better", "source")
        ),
        missing="a result of elastickv eval with --tasks or --dataset",
    )
