"""From images to two views on the device. The files here are doors, which a user runs or imports: `make_shards` packs
images into shards, `loader` and `labelled` hand out batches, and `preview`, `order` and `manifest` show what is in a
source. The work is done in four rooms: `packing`, `sources`, `reading`, `pixels`. `files`, `progress`, `permutation`
and `command` serve every room and import none."""
