"""On NATS JetStream: `python -m benchmarks append --bus nats://`."""
