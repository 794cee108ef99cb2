"""Adapters, API keys, idempotency keys, forget requests, and the count of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NAME, DIGEST = sa.String(128), sa.String(64)


def upgrade() -> None:
    """Make the tables."""
    changes = op.create_table(
        "changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(changes, [{"id": 1, "count": 0}])
    op.create_table(
        "adapters",
        sa.Column("name", NAME, primary_key=True),
        sa.Column("owner", NAME, index=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("file", DIGEST, nullable=False, unique=True),
        sa.Column("digest", DIGEST, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("layout", DIGEST, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("changed", sa.Float, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("digest", DIGEST, nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("owner", NAME),
        sa.Column("label", NAME, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    _requests()


def _requests() -> None:
    op.create_table(
        "idempotency",
        sa.Column("key", DIGEST, primary_key=True),
        sa.Column("owner", NAME, nullable=False, index=True),
        sa.Column("body", DIGEST, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("created", sa.Float, nullable=False, index=True),
    )
    op.create_table(
        "forget_requests",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("user", NAME),
        sa.Column("subject", DIGEST, nullable=False, index=True),
        sa.Column("asked_by", sa.String(16), sa.ForeignKey("api_keys.id")),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("finished", sa.Float),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("forget_requests", "idempotency", "api_keys", "adapters", "changes"):
        op.drop_table(table)
