"""A small mixture-of-experts language model, trained here on the Python standard library's sources.

`python -m bench.tiny_moe train --preset full --out DIR` writes a Hugging Face checkpoint (Qwen2MoE: routed experts, a
shared expert) with a byte-level BPE tokenizer, texts and a report, so that whatever reads a checkpoint reads it.

corpus: files, splits, tokenizer. presets: sizes. model: the transformers model, its fast experts, its routers.
train: the loop, resumable. report: held-out perplexity beside its baselines. checkpoint: the folder.
"""
