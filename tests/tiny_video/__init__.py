"""A family of text to video that effjax does not know: its models and converters.

`tests/test_pipeline_families.py` puts the files of `models` and `converters`, and the entry that
docs/pipelines.md shows, beside effjax's own.
"""
