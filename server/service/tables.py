"""The registry's tables. A change here needs a migration in `migrations/versions`; a test compares the two."""

from sqlalchemy import BigInteger, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

LONGEST_NAME = 128
"""Characters of a user's, an adapter's or a key's name."""


class Base(DeclarativeBase):
    """The root of all tables."""


class ChangeRow(Base):
    """One row that counts every change of an adapter: what other processes watch."""

    __tablename__ = "changes"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)
    folder: Mapped[str | None] = mapped_column(String(32))
    """What `registry.id` in the folder of the registry's files says."""


class AdapterRow(Base):
    """An adapter and the file that holds its numbers."""

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(String(LONGEST_NAME), primary_key=True)
    owner: Mapped[str | None] = mapped_column(String(LONGEST_NAME), index=True)
    """The user whose it is; None for one that everybody may use."""
    version: Mapped[int] = mapped_column(BigInteger)
    file: Mapped[str] = mapped_column(String(64), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    base: Mapped[str] = mapped_column(Text)
    layout: Mapped[str] = mapped_column(String(64))
    rank: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    changed: Mapped[float] = mapped_column(Float)


class KeyRow(Base):
    """An API key, of which the digest alone is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    owner: Mapped[str | None] = mapped_column(String(LONGEST_NAME))
    label: Mapped[str] = mapped_column(String(LONGEST_NAME))
    created: Mapped[float] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)


class OnceRow(Base):
    """A request that is answered once: the digest of its key, and the answer when there is one."""

    __tablename__ = "idempotency"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(LONGEST_NAME))
    body: Mapped[str] = mapped_column(String(64))
    answer: Mapped[str | None] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)
    __table_args__ = (Index("ix_idempotency_owner", "owner"), Index("ix_idempotency_created", "created"))


class ForgetRow(Base):
    """A request to forget somebody. The name is kept until it is done, and its digest afterwards."""

    __tablename__ = "forget_requests"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user: Mapped[str | None] = mapped_column(String(LONGEST_NAME))
    subject: Mapped[str] = mapped_column(String(64), index=True)
    asked_by: Mapped[str | None] = mapped_column(String(16), ForeignKey("api_keys.id"))
    state: Mapped[str] = mapped_column(String(16))
    evidence: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)
    finished: Mapped[float | None] = mapped_column(Float)
