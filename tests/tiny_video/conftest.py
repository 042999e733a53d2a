"""Modules of a family that a test puts into the library: no tests."""

collect_ignore_glob = ["*"]
