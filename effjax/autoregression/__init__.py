"""Images as sequences of tokens: the loops that sample them.

next_scale    VAR: one call for each map of tokens, from coarse to fine
"""

from effjax.autoregression.next_scale import NextScale, codes_of, teacher_forced

__all__ = ["NextScale", "codes_of", "teacher_forced"]
