"""What helps a team to test its services: deciders without a bus, a bus on a temporary file, and a clock to drive."""

from cauce.testing.clock import VirtualClock, VirtualLoop
from cauce.testing.deciding import given

__all__ = ["VirtualClock", "VirtualLoop", "given"]
