"""Images as sequences of tokens: the loops that sample them.

next_scale       VAR: one call for each map of tokens, from coarse to fine
collaborative    CoDe: a large VAR drafts the first maps, a small one makes the rest
next_stage       ECAR: a flow for each stage of resolution, from coarse to fine
stage_steps      ... and the search of how many steps each flow takes
maps             what the loops of VAR and ECAR share
stepwise         ... and those of students: a loop on the host
next_token       LlamaGen, Chameleon, Janus: one call for each token, row by row
next_group       what the loops of NAR and NBP share: one call for each group of tokens
next_diagonal    NAR: one call for each diagonal
next_block       NBP: one call for each block, such as a row
flow_map         tokens as functions of noise, by which one call can be trained to make them all
few_step         students that are so trained: all tokens in one call, or in two
"""

from effjax.autoregression.collaborative import Collaborative, call_flops, peak_cache
from effjax.autoregression.few_step import FewScales, FewStep, FewTokens, MappedScales, MappedTokens
from effjax.autoregression.flow_map import FlowSolver, flow_map
from effjax.autoregression.maps import MapLoop
from effjax.autoregression.next_block import NextBlock, Started
from effjax.autoregression.next_diagonal import NextDiagonal
from effjax.autoregression.next_group import group_loss
from effjax.autoregression.next_scale import NextScale, codes_of, teacher_forced
from effjax.autoregression.next_stage import NextStage, stage_loss
from effjax.autoregression.next_token import NextToken, logits_of
from effjax.autoregression.stage_steps import StageSteps, StepSearch, search_steps
from effjax.models.llamagen import Prompt

__all__ = [
    "Collaborative",
    "FewScales",
    "FewStep",
    "FewTokens",
    "FlowSolver",
    "MapLoop",
    "MappedScales",
    "MappedTokens",
    "NextBlock",
    "NextDiagonal",
    "NextScale",
    "NextStage",
    "NextToken",
    "Prompt",
    "StageSteps",
    "Started",
    "StepSearch",
    "call_flops",
    "codes_of",
    "flow_map",
    "group_loss",
    "logits_of",
    "peak_cache",
    "search_steps",
    "stage_loss",
    "teacher_forced",
]
