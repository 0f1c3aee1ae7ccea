"""Alembic's entry: runs the migrations on the connection that `shared.schema` hands over."""

from alembic import context

from shared.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True, compare_server_default=True)
with context.begin_transaction():
    context.run_migrations()
