"""Many cells through the benchmark: the plan, the file that outlives a kill, a process a device, the table."""
