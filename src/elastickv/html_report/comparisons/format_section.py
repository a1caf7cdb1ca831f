"""The section on KV formats: loss against stored bits, a point a format."""

from elastickv.html_report.charts.format_charts import format_chart
from elastickv.html_report.comparisons.format_losses import compared_formats
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import ReportData
from elastickv.results.formats.units import fixed, interval


def formats(data: ReportData) -> Section:
    """Return what models lose with each KV format that was named."""
    compared = compared_formats(data.evaluations)
    rows = (
        {
            "model": each.model,
            "context": str(each.context),
            "format": loss.cache,
            "bits": fixed(loss.bits, 3),
            "stored bits": fixed(loss.stored_bits, 3),
            "KL, nats": interval(loss.kl, 6),
            "same top-1, %": interval(loss.top1_percent, 1),
            "perplexity, %": interval(loss.ppl_percent, 2),
            "front": "yes" if loss in each.front else "",
            "source": loss.recipe,
        }
        for each in compared
        for loss in each.losses
    )
    return Section(
        "formats",
        "KV formats by stored bits",
        "Published KV formats, rounded by PyTorch references, and our own, through the cache that generates. Bits are those of "
        "a quantized element with its scales; stored bits count exact tokens and codebooks too. On the Pareto front no other "
        "format has both fewer stored bits and a smaller KL divergence.",
        charts=[format_chart(number, each) for number, each in enumerate(compared, 1)],
        tables=tables("KV formats, with 95 % intervals over windows", rows, ("model", "format", "front", "source")),
        missing="a result of elastickv eval with --formats",
    )
