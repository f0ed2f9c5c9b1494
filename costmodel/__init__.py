"""Measurements or build facts -> latency.

facts       what the compiler said about a kernel (BuildFacts)
occupancy   how many CTAs of it an SM holds
constants   the analytic model's physical numbers, each with its source
work        what one k-tile of one scheme costs an SM (bytes, instructions, tensor work), and how a load splits
launches    launches as objects, and as columns
analytic    the latency of a launch from the above: makespan of the tile list against DRAM time
table       CostTable: (linear, scheme, load) -> latency and configuration, from measurements or predictions
"""
