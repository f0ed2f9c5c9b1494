"""What a layer does around its two grouped GEMMs, step by step: route, gather, swiglu, combine.

Each step in two forms with one interface: `plain` in torch's operators, `fused` as one kernel or two that also quantise
for the next GEMM. `kernel_gen.moe.MoELayer` picks one a step.
"""
