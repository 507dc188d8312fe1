"""A short run of the harness over all surfaces, the same inputs every time."""

from pathlib import Path

import pytest

from fuzz.__main__ import table
from fuzz.campaign import Campaign
from fuzz.surface import SURFACES

INPUTS = 12_000
"""Two minutes on two cores."""


@pytest.mark.slow
def test_every_hostile_input_is_accepted_or_refused_in_a_sentence(base: Path) -> None:
    campaign = Campaign(base, seed=1)
    campaign.run_inputs(list(SURFACES), INPUTS, jobs=2)
    assert not campaign.found, table(campaign, 0)
    assert not campaign.broken
    assert set(campaign.tallies) == set(SURFACES)
