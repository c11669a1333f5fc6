"""The tools of the database's owner: schema, migrations, partitions, aggregates, roles, maintenance."""
