"""Small modules behind the training scripts in `launch/`; a package imports only packages below it (see README.md)."""
