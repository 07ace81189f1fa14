"""Floor 1: files and folders written atomically, background reading and writing, digests."""
