"""What a report says, by section."""

import json


def sections(report):
    """Return the sections of a report that was made, by name."""
    return {one["name"]: one for one in json.loads(report.to_json())["sections"]}


def rows(table):
    """Return a table's rows by the names of its columns."""
    return [dict(zip(table["headers"], cells, strict=True)) for cells in table["rows"]]
