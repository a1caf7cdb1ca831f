"""Published methods beside our own: KV formats by stored bits, selections by read bytes."""
