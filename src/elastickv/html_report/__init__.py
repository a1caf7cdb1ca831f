"""The page that results make: what is shown of them, how it is drawn, and how it is written."""
