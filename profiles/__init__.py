"""The facts BiTile stands on: what a GPU, an MoE model, a precision scheme, a kernel configuration, a token load and a
measurement are, and the store that keeps measurements.

Nothing here needs torch, CUTLASS or a GPU. Every other package imports this one; this one imports none of them.

| module | holds |
|---|---|
| `errors` | the project's exceptions |
| `schemes` | precision schemes and their names |
| `kernels` | shapes of tiles and problems, kernel configurations and their names |
| `gpus` | GPUs, each with the source of its numbers |
| `models` | shapes of MoE models, by name or from a Hugging Face `config.json` |
| `loads` | how many tokens each expert gets |
| `records`, `store` | one measurement, and the Parquet table of them |
| `parquet_file` | reading any Parquet file, verified |
| `places` | where profiles that come with the package are, and the cache |
"""

from profiles.interrupt import end_at_once

end_at_once("profiles")
