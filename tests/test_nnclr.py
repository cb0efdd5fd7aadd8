"""NNCLR's own flags together: Algorithm 2, the symmetric loss and small crops."""

import pytest
from test_ranks import two_ranks_are_one


@pytest.mark.long
def test_all_options_on_two_ranks(tmp_path):
    flags = ["--momentum-encoder", "--symmetric-loss", "--multi-crop", "--small-crops", "2"]
    two_ranks_are_one(tmp_path, "nnclr", *flags)
