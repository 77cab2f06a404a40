"""From raw files to a dataset: `mova prepare`."""
