"""The charts of the page, drawn with matplotlib."""
