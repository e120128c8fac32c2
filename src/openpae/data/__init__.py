"""Images, packed images and caches.

- `shards` is the format of every cache. `shard_writer.ShardWriter` decides what a cache accepts when a
  command goes on with it. `shards.Shards` checks a cache that is opened. `caches` says which facts a cache
  of latents or features keeps.
- `order` gives the data order as a function of the seed and the images seen.
"""
