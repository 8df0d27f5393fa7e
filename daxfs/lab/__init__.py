"""The lab: named scenarios on real mounts with real processes, and a storm of all of them at once.

scenario.py says what a scenario is, course.py what most of them do, catalogue/ has them all, runner.py runs them;
storm.py is the randomised run; naive.py models the wait that Linux could not have. A person's own file imports from
here.
"""

from daxfs.lab.course import at_once, breaks, case, punch, truncate
from daxfs.lab.scenario import Lab, everywhere, story

__all__ = ["Lab", "at_once", "breaks", "case", "everywhere", "punch", "story", "truncate"]
