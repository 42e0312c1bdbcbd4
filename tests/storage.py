"""What a bus lies in, changed as its administrator, or chance, may change it."""

from __future__ import annotations

import apsw
import nats as plain
import pytest

from tests.kept import backend_at
from tests.servers import Nats, Postgres

__all__ = ["Storage", "storage"]


class Storage:
    """Where one bus lies: a file, a schema, or streams."""

    def __init__(self, url: str, postgres: Postgres | None, nats: Nats | None, name: str) -> None:
        self.url, self.postgres, self.nats, self.name = url, postgres, nats, name

    def sql(self, statement: str) -> None:
        if self.postgres is not None:
            self.postgres.sql(f"set search_path = {self.name}", statement.replace("x'7b7d'", "'{}'::bytea"))
            return
        connection = apsw.Connection(self.url.partition(":///")[2])
        connection.execute(statement)
        connection.close()

    async def unlock(self) -> None:
        """What nobody may delete from a stream is settled when it is made: it is made as an administrator might."""
        if self.nats is not None:
            async with backend_at(self.url):
                pass
            stream = f"{self.name}_facts"
            config = self.nats.request(f"$JS.API.STREAM.INFO.{stream}")["config"]
            self.nats.request(f"$JS.API.STREAM.DELETE.{stream}")
            free = config | {"deny_delete": False, "deny_purge": False}
            assert "error" not in self.nats.request(f"$JS.API.STREAM.CREATE.{stream}", free)

    async def remove(self, log: str, position: int) -> None:
        if self.nats is None:
            self.sql(f"delete from {log} where position = {position}")
            return
        stream = f"{self.name}_{log}"
        assert self.nats.request(f"$JS.API.STREAM.MSG.DELETE.{stream}", {"seq": position})["success"]

    async def change(self, log: str, position: int) -> int:
        """Another body under the same digest. Gives where that stands: on NATS only at the end of the log."""
        if self.nats is None:
            self.sql(f"update {log} set body = x'7b7d' where position = {position}")
            return position
        client = await plain.connect(self.nats.url())
        js = client.jetstream()
        message = await js.get_msg(f"{self.name}_{log}", position)
        headers = {key: value for key, value in (message.headers or {}).items() if not key.startswith("Nats-")}
        ack = await js.publish(str(message.subject), b"{}", headers=headers)
        await client.close()
        return ack.seq

    async def publish(self, subject: str, payload: bytes) -> int:
        assert self.nats is not None
        client = await plain.connect(self.nats.url())
        ack = await client.jetstream().publish(f"{self.name}.{subject}", payload)
        await client.close()
        return ack.seq


@pytest.fixture
async def storage(each_bus: str, backend: str, request: pytest.FixtureRequest) -> Storage:
    """Where a bus lies."""
    server = {"postgresql": "postgres", "nats": "nats"}.get(backend)
    found = request.getfixturevalue(server) if server is not None else None
    storage = Storage(
        each_bus,
        found if isinstance(found, Postgres) else None,
        found if isinstance(found, Nats) else None,
        request.getfixturevalue("bus_name") if server is not None else "",
    )
    await storage.unlock()
    return storage
