"""Models and methods as a newcomer would write them, on which the design is tried."""
