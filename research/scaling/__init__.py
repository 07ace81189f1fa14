"""Floor 6: what training costs and what it yields: FLOPs, memory, device peaks, scaling laws."""
