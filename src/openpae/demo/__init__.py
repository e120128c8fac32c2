"""`pae demo`: a page in the browser to walk through a latent space."""
