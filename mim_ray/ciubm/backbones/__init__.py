"""User behavior models (Eq. 1) with one face: target, behaviors, mask -> interest."""
