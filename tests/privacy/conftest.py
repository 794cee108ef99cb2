"""Laws here run real accountants and processes, whose first call is slow on a busy machine: no deadlines."""

from hypothesis import settings

settings.register_profile("privacy", deadline=None)
settings.load_profile("privacy")
