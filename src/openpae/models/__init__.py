"""The networks, and their sizes (`configs`).

- To add a VFM, add a row to `vfms.ENCODERS`.
- `tokenizer` holds the two tokenizers PAE and RAE, `dit` and `ditdh` the two generators.
- `saved` loads and writes them as folders.
"""
