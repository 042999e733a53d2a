"""Images as sequences of tokens: the loops that sample them.

next_scale    VAR: one call for each map of tokens, from coarse to fine
flow_map      tokens as functions of noise, by which one call can be trained to make them all
"""

from effjax.autoregression.flow_map import FlowSolver, flow_map
from effjax.autoregression.next_scale import NextScale, codes_of, teacher_forced

__all__ = ["FlowSolver", "NextScale", "codes_of", "flow_map", "teacher_forced"]
