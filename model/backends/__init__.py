"""The attention kernels, each behind one small interface (interface.py), and the choice among them (choice.py)."""
