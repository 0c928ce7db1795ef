"""What `--data` names, and its bytes. In come a folder, tars, a URL or a YAML card; out comes a `Source` (shards with
their sample counts, checksums and weights) and a `Storage` that reads bytes of shards, local or remote by way of a
cache. Missing manifests and indexes are built here, and `check` compares shards with their manifest."""
