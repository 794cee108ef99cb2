"""The roof: the `lethe` command, the run file and the report."""
