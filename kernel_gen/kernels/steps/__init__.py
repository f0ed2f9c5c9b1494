"""Device kernels of a layer's steps around its two grouped GEMMs.

Units: route (expert ids to places in expert order), gather (tokens to those places, in the form that the first GEMM
reads), swiglu (the first GEMM's output to the second's input), combine (the second's output to tokens, weighted), rows
(a CTA holds one row: load, largest value, quantise, store), ptx (instructions). `spec` says what is compiled.
"""
