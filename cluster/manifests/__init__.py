"""Manifests of a cluster, from a config of Serve and the pools that it is placed on."""
