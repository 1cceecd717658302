"""The three stages: prepare, train (fetch, then the training processes), export. Each finds its own finished work."""
