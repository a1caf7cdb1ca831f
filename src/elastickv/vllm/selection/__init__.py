"""Which pages decodes read on a CPU."""
