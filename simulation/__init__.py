"""One machine: in-process Flower Grids (sequential, cohort) and Flower's Ray engine."""
