"""Hypothesis runs the same examples every time; a failure prints what reproduces it.

`--hypothesis-profile=explore` looks elsewhere: more examples, from a seed that is printed when one fails.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "daxfs",
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("daxfs"), derandomize=False, max_examples=2000, database=None
)
settings.load_profile("daxfs")
