"""Three NATS servers on loopback that are one JetStream; each can be killed, paused, or cut off from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.servers.link import Links
from tests.servers.nats import Nats
from tests.servers.process import free_port, until

__all__ = ["NatsCluster"]

NOWHERE = "127.0.0.1:1"


class NatsCluster:
    """Servers `n0`, `n1`, `n2`. Each way between two leads through a relay of its own, so that it can be cut.

    Raises `Missing` where there is no binary.
    """

    def __init__(self, *, sync: str | None = "always", config: str = "") -> None:
        self._links = Links()
        self._ways: dict[tuple[int, int], Callable[[bool], None]] = {}
        self.servers: list[Nats] = []
        try:
            self._start(sync, config)
            self.whole()
        except BaseException:
            self.remove()
            raise

    def _start(self, sync: str | None, config: str) -> None:
        routes = [free_port() for _ in range(3)]
        for n, port in enumerate(routes):
            to = {m: free_port() for m in range(3) if m != n}
            for m, way in to.items():
                self._ways[n, m] = self._links.add(routes[m], way)
            # What servers tell each other of their addresses leads nowhere: there is no way but through the relays.
            cluster = (
                f"cluster {{ name: cauce, listen: '127.0.0.1:{port}', cluster_advertise: '{NOWHERE}', no_advertise: true, "
                f"routes: [{', '.join(f'nats://127.0.0.1:{way}' for way in to.values())}] }}\n{config}"
            )
            self.servers.append(Nats(name=f"n{n}", sync=sync, config=cluster))

    def url(self, bus: str = "", *, replicas: int = 3) -> str:
        """The address of a bus on all three."""
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.servers)
        return f"nats://{hosts}" + (f"/{bus}?replicas={replicas}" if bus else "")

    def leader_of(self, stream: str, *, asking: int | None = None) -> int | None:
        """Which server leads a stream, None while nobody does.

        Parameters:
            asking: only this server is asked; else the first that answers.
        """
        for server in self.servers if asking is None else [self.servers[asking]]:
            try:
                answer = server.request(f"$JS.API.STREAM.INFO.{stream}", timeout=1.0)
            except OSError:
                continue
            leader = (answer.get("cluster") or {}).get("leader")
            if leader:
                return next(n for n, each in enumerate(self.servers) if each.name == leader)
        return None

    def other_leader(self, stream: str, than: int) -> int:
        """Wait until the others of a cluster have a leader of their own for this stream; returns which."""
        others = [n for n in range(3) if n != than]
        found: list[int] = []

        def look() -> bool:
            found[:] = [at for n in others if (at := self.leader_of(stream, asking=n)) in others]
            return bool(found)

        until(look, f"a leader of {stream} other than n{than}", self.log)
        return found[0]

    def cut_off(self, server: int) -> None:
        """Nothing goes between this one and the others; clients reach all of them."""
        self._let(server, through=False)

    def heal(self, server: int) -> None:
        self._let(server, through=True)

    def _let(self, server: int, *, through: bool) -> None:
        for ends, way in self._ways.items():
            if server in ends:
                way(through)

    def whole(self, stream: str | None = None) -> None:
        """Wait until all three run as one, and, if a stream is named, each of them has all of it."""
        for server in self.servers:
            if not server.process.alive():
                server.start()
        until(lambda: self._whole(stream), "three servers that are one", self.log, patience=60.0)

    def _whole(self, stream: str | None) -> bool:
        try:
            if stream is not None:
                return self._replicated(self.servers[0].request(f"$JS.API.STREAM.INFO.{stream}", timeout=2.0))
            probe = {"name": "probe", "subjects": ["probe"], "num_replicas": 3, "storage": "memory"}
            for server in self.servers:
                if "error" in server.request("$JS.API.STREAM.CREATE.probe", probe, timeout=2.0):
                    return False
                server.request("$JS.API.STREAM.DELETE.probe", timeout=2.0)
        except OSError:
            return False
        return True

    @staticmethod
    def _replicated(told: dict[str, Any]) -> bool:
        followers = (told.get("cluster") or {}).get("replicas") or []
        return len(followers) == 2 and all(each["current"] and not each.get("lag") for each in followers)

    def drop(self, bus: str) -> None:
        self.servers[0].drop(bus)

    def log(self) -> str:
        return "\n".join(f"{each.name}: {each.log()[-2000:]}" for each in self.servers)

    def remove(self) -> None:
        for each in self.servers:
            each.remove()
        self._links.close()
