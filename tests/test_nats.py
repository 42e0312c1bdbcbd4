"""The log seam on NATS JetStream, where the server is killed, changed, or set up so that a promise would break."""

from __future__ import annotations
