"""Encoded bytes become views. In come an image's bytes and the parameters of its views; out come normalised tensors
on the device. `decode` is the only place that opens an image with Pillow, `screen` tells whether DALI would decode it
the same way, `views` draws the parameters, `graph` runs DALI with the kernels."""
