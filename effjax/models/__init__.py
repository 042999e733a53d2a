"""One file per architecture, written to be read beside the paper."""
