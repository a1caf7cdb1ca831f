"""The section on methods at equal bytes: KV formats, selections and our recipes."""

from collections.abc import Iterator, Mapping

from elastickv.html_report.charts.frontier_charts import frontier_charts
from elastickv.html_report.comparisons.equal_bytes import sentences
from elastickv.html_report.comparisons.method_losses import ComparedMethods, compared_methods, front, read_bits, stored_bits
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import ReportData
from elastickv.results.formats.units import fixed, interval, size


def frontier(data: ReportData) -> Section:
    """Return what models lose with each method that was compared, by stored and by read bits."""
    compared = compared_methods(data.evaluations)
    rows = (row for each in compared for row in _rows(each))
    return Section(
        "frontier",
        "Methods at equal bytes",
        "Published KV formats and selections, as PyTorch references, and our own recipes, through the cache that generates. "
        "Bits are those of an element of K and V, of which a dense cache stores and reads 16: exact tokens, scales, codebooks "
        "and what scoring reads count. Numbers have the dtype in `from` before they are quantized. A line joins what no "
        "other of its method beats; the rest is hollow.",
        charts=[chart for number, each in enumerate(compared, 1) for chart in frontier_charts(number, each)],
        tables=tables("Methods, with 95 % intervals over windows", rows, ("model", "method", "cache", "front", "source")),
        notes=[sentence for each in compared for sentence in sentences(each)],
        missing="a result of elastickv eval with --formats or --selections",
    )


def _rows(compared: ComparedMethods) -> Iterator[Mapping[str, str]]:
    fronts = {name: front(compared.losses, bits) for name, bits in (("stored", stored_bits), ("read", read_bits))}
    for one in compared.losses:
        loss = one.loss
        yield {
            "model": compared.model,
            "context": str(compared.context),
            "method": one.method,
            "cache": loss.cache,
            "from": loss.exact_dtype or "",
            "bits": fixed(loss.bits, 3),
            "stored bits": fixed(one.stored_bits, 3),
            "read bits": fixed(one.read_bits, 3),
            "bytes read": size(loss.read_bytes),
            "KL, nats": interval(loss.kl, 6),
            "same top-1, %": interval(loss.top1_percent, 1),
            "perplexity, %": interval(loss.ppl_percent, 2),
            "front": ", ".join(name for name, best in fronts.items() if one in best),
            "source": loss.recipe,
        }
