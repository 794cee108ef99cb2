"""Durable requests to forget: what a store holds, how a request is worked off, and the record that remains of it."""
