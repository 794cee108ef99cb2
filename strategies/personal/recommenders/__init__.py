"""Conventional recommenders: fitted on training rows, then frozen; all answer the same queries."""
