"""Weights on disk in any known layout: recognized by folders and names, read slice by slice.

files.py    tensors of safetensors (one file, or sharded with an index) and .pth files, by name and range
names.py    the names that the layouts use for the same tensor
configs.py  config.json of the layouts <-> the sizes and switches of model/
parts.py    which folder holds which part of the model, and from which of its tensors the part is read
write.py    safetensors files, sharded with an index, one at a time
"""
