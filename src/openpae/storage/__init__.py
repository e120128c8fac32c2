"""Files on disk. This room knows no model.

- A command finds a tokenizer or a generator by `model_folder.model_folder`: the folder itself where it
  holds model.safetensors, otherwise the newest checkpoint of a run folder.
- `files` writes files and folders completely or not at all. `outputs` keeps commands off files of the user.
- `weights` reads weight files without running code in them. `pairs` finds a tokenizer with its generator.
- `hub` loads from and uploads to the Hugging Face hub, with the model card of `card`. `assets` has weights
  and pictures from package registries, which `registry` downloads.
"""
