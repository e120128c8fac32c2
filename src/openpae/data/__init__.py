"""Images, packed images and caches.

- `shards` is the format of every cache. `shard_writer.ShardWriter` checks what a cache accepts,
  `shards.Shards` checks what it opens. `caches` says which facts a cache of latents or features keeps.
- `order` gives the data order as a function of the seed and the images seen.
"""
