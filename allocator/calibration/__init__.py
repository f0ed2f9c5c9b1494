"""From a checkpoint folder and some text to a trace and a sensitivity. Needs the extra `models` (torch, transformers).

checkpoint, adapters, model    a Hugging Face MoE folder, streamed layer by layer
experts, recording             one layer's experts: run, quantised or not, and what they were given
data                           text or token ids -> sequences
routing, skew                  the trace and its picture
hadamard, grid, gptq, quantizer    weights -> kernel_gen.formats.QuantizedWeights
visits, statistics             every MoE layer in turn with its activations, gradients, Hessians
measures, layer_losses, sensitivities, partial    changes of the output -> Sensitivity; resumable
streams, measured, additivity, check    what whole allocations cost, measured; predicted against measured
"""
