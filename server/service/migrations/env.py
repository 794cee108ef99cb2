"""What Alembic runs: the steps that a database lacks, over the connection that the registry hands it."""

from alembic import context

from server.service.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
