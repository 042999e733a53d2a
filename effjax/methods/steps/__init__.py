"""Methods that leave out most blocks in some steps of a sampler and predict what these add."""
