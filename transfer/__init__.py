"""Judging an encoder, and its use elsewhere: kNN, linear protocol, fine-tuning, several encoders side by side, features
and what is computed from them, galleries of neighbours, curves and report of a run, export to other layouts. Everything
takes a run folder, one of its checkpoints, a MoCo file of the reference code, or a ResNet's weights."""
