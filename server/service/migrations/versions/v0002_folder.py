"""Which folder the registry's files are in."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the folder's identity, which is given when the registry is opened."""
    op.add_column("changes", sa.Column("folder", sa.String(32)))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("changes", "folder")
