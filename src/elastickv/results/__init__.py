"""Results on disk: reading, comparing and formatting them."""
