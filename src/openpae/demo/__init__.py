"""`pae demo`: a page in the browser to walk through a latent space.

- `page` is the layout, `studio` computes what it shows.
- `inputs` has the pictures that the demo starts with, and checks those of a visitor.
"""
