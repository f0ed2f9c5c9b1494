"""Whole MoE layers on this GPU, router's output in, layer's output out: `python -m bench.layer --measure --out DIR`.

allocations (which expert has which scheme), weights (packed once a scheme, shared by all), tuning (which
configuration), contenders (who runs), measuring (rounds over all of a cell), report and plot.
"""
