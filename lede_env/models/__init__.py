"""The embedded model: where it comes from and how it is read."""
