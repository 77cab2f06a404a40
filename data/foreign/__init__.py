"""Files written by other software, read with suspicion: the parts of data.import_latents."""
