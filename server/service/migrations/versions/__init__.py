"""One module for every step of the registry's tables."""
