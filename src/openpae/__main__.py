"""`python -m openpae` is `pae`."""

from openpae.cli import main

main()
