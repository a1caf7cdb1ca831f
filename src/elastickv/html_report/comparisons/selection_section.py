"""The section on selections: loss against read bytes, a curve a method."""

from elastickv.html_report.charts.selection_charts import selection_chart
from elastickv.html_report.comparisons.selection_losses import compared_selections
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import ReportData
from elastickv.results.formats.units import fixed, interval, size


def selections(data: ReportData) -> Section:
    """Return what models lose with each selection at each C, beside our recipes."""
    compared = compared_selections(data.evaluations)
    rows = (
        {
            "model": each.model,
            "context": str(each.context),
            "method": method,
            "cache": loss.cache,
            "bytes read": size(loss.read_bytes),
            "read 1/": fixed(loss.read, 2),
            "stored 1/": fixed(loss.stored, 2),
            "KL, nats": interval(loss.kl, 4),
            "same top-1, %": interval(loss.top1_percent, 1),
            "perplexity, %": interval(loss.ppl_percent, 2),
            "source": loss.recipe,
        }
        for each in compared
        for method, losses in each.curves.items()
        for loss in losses
    )
    return Section(
        "selections",
        "Selections by read bytes",
        "Published selections and evictions, as PyTorch references over exact 16-bit keys and values, and our own recipes at "
        "the same C. Bytes are those that one sequence reads in a step, what scoring reads included.",
        charts=[selection_chart(number, each) for number, each in enumerate(compared, 1)],
        tables=tables("Selections, with 95 % intervals over windows", rows, ("model", "method", "cache", "source")),
        missing="a result of elastickv eval with --selections",
    )
