"""What each program writes, as dataclasses: one module a kind, each read by `from_dict`."""
