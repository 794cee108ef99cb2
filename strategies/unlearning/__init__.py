"""Forgetting on request: slots and adapters that forget, what they are asked, and proof that it is gone."""
