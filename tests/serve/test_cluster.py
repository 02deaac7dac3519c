"""The settings of the Ray Serve application; the application itself is tried where Ray is installed."""

import pytest

from lockstep.serve.cluster.application import Settings


def test_settings_that_are_not_there_are_refused_by_name():
    assert Settings(model="org/model", replicas=2, options=dict(weights="q8_0")).threads == 1
    with pytest.raises(ValueError, match=r"(?s)replica\n.*not permitted"):
        Settings(replica=2)
