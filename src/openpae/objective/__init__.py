"""Every equation that is minimised.

- `losses` has one function an equation: Eq. 3 (SSR) `gram_alignment`, Eq. 4 (MCR) `perturb` and
  `consistency`, Eq. 5 (SCR) `semantic_alignment`.
- `settings` has the weights, `terms` the sum, `flow` the path and the velocity loss of the generator.
"""
