"""Real servers for tests, each on free ports of loopback: PostgreSQL, NATS JetStream, and a cluster of three NATS."""

from tests.servers.cluster import NatsCluster
from tests.servers.missing import Missing, absent, on_ci
from tests.servers.nats import Nats
from tests.servers.postgres import Postgres

__all__ = ["Missing", "Nats", "NatsCluster", "Postgres", "absent", "on_ci"]
