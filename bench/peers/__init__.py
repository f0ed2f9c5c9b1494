"""Our kernels beside the fastest public ones: `python -m bench.peers` (docs/peers.md).

* `roofline` the least time a launch could take on the card, and each scheme's class of peers
* `published` the peers' measured fractions of it (peers_h200.csv)
* `recorded` our recorded launches against those; `mixed` recorded mixed launches against their parts
* `report`, `plot` the tables and the picture
* `routing`, `contenders`, `triton_grouped`, `measuring` `--measure`: ours, torch's and Triton's kernels in one run
"""
