"""Training of MiM-DiT on pictures that are damaged on the fly."""
