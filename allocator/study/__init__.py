"""The outer study: what the exact solver takes as given - which schemes a launch is compiled for, which configuration
runs it under which load, what latency is worth - is sampled by Optuna, solved inside and priced as whole launches.

__main__    `python -m allocator.study`
evidence    token loads by scenario, and what was measured under them
problem     everything that a trial reads: blocks, launches, budget
pricing     latency of a launch: the analytic model, scaled by the measurements nearest to it
menu        what may be sampled: scheme sets and configurations that a kernel can be generated for, and nothing else
evaluate    a choice -> the inner solver's assignment -> its loss and launch latencies
objective   values, constraints, attributes and pruning of a trial
warm        first trials: uniform schemes, Lagrangian breakpoints, sets at the limits
sets        scheme sets by the exact solver, every scheme at its own best kernel
storage     a URL -> an Optuna storage
run         the loop, and allocations from its results
finalists   the best allocation of a study, for `allocator.tune`
correction  the corrected loss of allocator.additivity
"""
