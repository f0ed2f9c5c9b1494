"""Formats, device kernels and everything around them: what can be built, compile, gate, bundle, launch, time, sweep.

Importing this package needs neither torch nor CUTLASS nor a GPU; the modules that do are imported where they are used
(ARCHITECTURE.md lists them).
"""
