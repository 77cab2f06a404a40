"""Built-in encoders without weights, with the geometry of MOVA's: one clip, everywhere, with no download.

They keep far less than the real VAEs, yet enough to watch and to hear, so that the whole path from mp4 to a sampled mp4
works on any machine. Each module has `encode`, `video` and `audio` also `decode`, and a `fingerprint` that
changes with every constant: latents of different fingerprints must not be mixed.
"""
