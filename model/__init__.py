"""The networks and the method: encoders, MoCo in the order of the paper's Algorithm 1, the two other dictionaries of
its figure 2, shuffle BN and split BN, and the layout of released MoCo files. Plain tensors, ints and process groups
go in; nothing here knows of recipes, shards or commands."""
