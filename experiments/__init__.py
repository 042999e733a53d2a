"""Data, judges, training scripts and measurements that go with effjax."""
