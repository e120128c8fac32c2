"""The networks, and their sizes (`configs`).

- To add a VFM of the transformers package, add a row to `vfms.ENCODERS`; `vfms.EncoderSpec` says what a row
  states. Another family also needs a name in `EncoderSpec.family` and a class in `backbones`.
- `tokenizer` holds the two tokenizers PAE and RAE. Their parts are `encoders`, `modulator` and `decoder`,
  their initial weights `starts`.
- `dit` and `ditdh` hold the two generators, `generator` their base, `layers` small parts of many models.
- `priors` has the refiner and raw targets, `upsampling` the features that a refiner must match.
- `lpips` (weights: `lpips_weights`), `discriminator` and `denoiser` are networks of losses.
- `saved` loads and writes models as folders. `precision` brings them to half precision.
"""
