"""The outer study: what the exact solver takes as given - which schemes a launch is compiled for, which configuration
runs it under which load, what latency is worth - is sampled by Optuna, solved inside and priced as whole launches.

__main__    `python -m allocator.study`
evidence    token loads by scenario, and what was measured under them
problem     everything that a trial reads: blocks, launches, budget
pricing     latency of a launch: the analytic model, scaled by the measurements nearest to it
menu        what may be sampled: scheme sets and configurations that a kernel can be generated for, and nothing else
evaluate    a choice -> the inner solver's assignment -> its loss and launch latencies
assigned    that assignment with its launches at the limits, and the slack spent
objective   goals, and a trial's parameters as a choice
trial       a trial: solved, priced, recorded or pruned
sequential  the pipeline without a study: best kernel per scheme first, bits second
warm        first trials: the sequential pipeline's answers, uniform schemes, Lagrangian breakpoints, sets at the limits
sets        scheme sets by the exact solver, every scheme at its own best kernel
storage     a URL -> an Optuna storage
run         the loop, and allocations from its results
finalists   the best allocation of a study, for `allocator.tune`
correction  the corrected loss of allocator.additivity
"""
