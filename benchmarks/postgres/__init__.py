"""On a database of PostgreSQL: `python -m benchmarks append --bus postgresql://user@host/database`."""
