"""Images become shards. In come the folders, lists, archives and URLs that a user names; out go tar shards with their
indexes, a manifest, the list of what was rejected and a contact sheet. The work is planned before any image is read,
so that workers are independent of each other and an interrupted command goes on where it stopped."""
