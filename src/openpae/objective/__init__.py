"""Every equation that is minimised.

- `losses` has the equations: Eq. 3 (SSR) is `gram_alignment`, Eq. 5 (SCR) `semantic_alignment`. Eq. 4 (MCR)
  is `consistency` of the decodes of `perturb`; `terms.image_terms` adds its two angles.
- `settings` has the weights, `terms` the sum, `flow` the path and the velocity loss of the generator.
- To add a loss, write a function in `losses`, give it a weight in `settings.TokenizerLoss`, and add it in
  `terms`.
"""
