"""The model with its optimizer, under FSDP2 or DeepSpeed ZeRO."""
