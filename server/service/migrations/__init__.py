"""The registry's migrations, for Alembic."""
