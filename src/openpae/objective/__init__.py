"""Every equation that is minimised.

- `losses` has the equations: Eq. 3 (SSR) is `gram_alignment`, Eq. 5 (SCR) `semantic_alignment`. Eq. 4 (MCR)
  is `consistency` of the decodes of `perturb`; `terms.image_terms` adds the terms of its two angles.
- `terms` makes the terms of Eq. 2 and 6, `settings` has their weights. `train.tokenizer` forms the weighted
  sum. `rivals` has losses of other papers, `flow` the path and the velocity loss of the generator.
- To add a loss, write a function in `losses`. Give it a weight in `settings.TokenizerLoss`, and its name in
  `TokenizerLoss.weights`. Add it in `terms`: to `image_terms` and to `BALANCED` if it is a term of decodes,
  to `prior_terms` if it compares latents with targets, else to `generic_terms`.
"""
