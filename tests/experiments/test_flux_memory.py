"""What chips exchange is read from compiled programs, loops included; bad chips are refused."""

import pytest

from effjax.chips import chips
from experiments.flux_memory import collectives

PROGRAM = """
%turn (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = (bf16[4,8]{1,0}, f32[8]{0:T(128)}) all-reduce(%a, %b), channel_id=1
}

%more (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(19)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %while.1 = (s32[], bf16[4,8]) while(%t), condition=%more, body=%turn
  %start = (s8[16]{0}, s8[16]{0}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=2
  %done = s8[16]{0} collective-permute-done(%start)
}
"""


def test_collectives_count_as_often_as_they_run():
    found = collectives(PROGRAM)
    assert found["collectives"] == 19 + 1
    assert found["exchanged_MB"] == (19 * (2 * 32 + 4 * 8) + 16) / 1e6
    assert collectives("ENTRY %main () -> f32[] {\n}") == {"collectives": 0, "exchanged_MB": 0}


def test_chips_that_are_none():
    with pytest.raises(ValueError, match=r"at least 1 chip, of one of .*; got 0 of 'v5e'"):
        chips("v5e", 0)
    with pytest.raises(ValueError, match="got 1 of 'v9'"):
        chips("v9", 1)
