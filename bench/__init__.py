"""Speed of BiTile itself: pytest-benchmark suites, and their comparison with a baseline for each kind of machine.

`make bench` runs the suites that this machine can run and compares them with `bench/baselines/<machine kind>.json`.
"""

from profiles.interrupt import end_at_once

end_at_once("bench")
