"""A decode as one captured graph: recorded, replayed, launched ahead of its call."""
