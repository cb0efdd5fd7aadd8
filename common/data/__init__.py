"""Images: the sets by name, the keyed order and loaders, shards, packing, splits."""
