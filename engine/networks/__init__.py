"""Trainable adapters on the layers of a frozen transformer; `network.inject` puts them there.

One adapter belongs to one *published* layer. Where our classes split that layer (q, k and v of a
fused projection), its parts share the adapter and each uses its own rows, so that what is trained
is exactly an adapter of the published layer and is saved under its name.
"""
