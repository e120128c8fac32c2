"""The networks, and their sizes (`configs`).

- To add a VFM of the transformers package, add a row to `vfms.ENCODERS`; `vfms.EncoderSpec` says what a row
  states. Another family also needs a name in `EncoderSpec.family` and a class in `backbones`.
- `tokenizer` holds the two tokenizers PAE and RAE, `dit` and `ditdh` the two generators.
- `saved` loads and writes them as folders.
"""
