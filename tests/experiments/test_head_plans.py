"""Choices of `experiments.head_plans`, by hand."""

import numpy as np

from effjax.methods.attention.dit_fast_attn_v2.patch import Tokens
from experiments.head_plans import arrow_mask, by_layer, matched, plain_mask, taken


def test_plain_windows_see_at_least_the_pairs_of_arrows():
    tokens = Tokens(image=16, text=6, text_first=False, tile=None)
    for width in (1, 3, 8):
        arrow, plain = (mask(tokens, width).sum() for mask in (arrow_mask, plain_mask))
        assert arrow == 22**2 - (16 - width - 1) * (16 - width)
        assert arrow <= plain <= arrow + 2 * 22


def test_one_choice_for_each_layer():
    """Two layers of two heads, two candidates that save 1 and 0.5 of a head."""
    errors = np.array([[[[0.3, 0.1], [0.3, 0.1]], [[0.1, 0.0], [0.2, 0.1]]]])
    savings = np.array([1.0, 0.5])
    np.testing.assert_array_equal(by_layer(errors, savings, 0.25), [[1, 1]])
    np.testing.assert_array_equal(by_layer(errors, savings, 0.31), [[1, 0]])
    np.testing.assert_array_equal(by_layer(errors, savings, 0.05), [[-1, -1]])
    chosen = matched(errors, savings, 0.75)
    np.testing.assert_array_equal(chosen[0, :, 0], [1, 0])
    np.testing.assert_allclose(taken(errors, savings, chosen), (0.75, 0.5))
