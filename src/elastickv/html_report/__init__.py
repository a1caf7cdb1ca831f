"""The HTML report: its data, charts, tables and files."""
