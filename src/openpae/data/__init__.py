"""Images, packed images and caches.

- `shards` is the format of every cache. `shard_writer.ShardWriter` decides what a cache accepts when a
  command goes on with it. `shards.Shards` checks a cache that is opened. `caches` says which facts a cache
  of latents or features keeps.
- `order` gives the data order as a function of the seed and the images seen. `training` has the training
  data in this order, `readers` the worker processes that read it, `settings` its config.
- `images` opens images of any form: a folder of files (`listing`, `label_files`), or one of `forms`, which
  are `archives`, `arrays` (by `npz`), `parquet` and `hub_images`, all of them `records`. `packing` packs
  images.
- `decode` decodes a file, `colour` converts it to RGB, `crops` scales and crops, `pixels` checks and shows
  tensors of pixels.
- `classes` compares class names, `fingerprints` names the content of folders.
- `label_maps` has a label for every pixel. `openmoji`, `scenes` and `backgrounds` make pictures of emoji.
"""
