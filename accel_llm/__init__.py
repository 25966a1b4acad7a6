"""Small modules behind the training scripts in `launch/`; imports only ever point to a lower layer (see README.md)."""
