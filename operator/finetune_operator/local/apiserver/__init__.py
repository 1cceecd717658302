"""An API server that kubectl, kopf and the Python client take for Kubernetes.

`store` keeps objects and history, `api` holds the rules (what a create, update or delete does), `server` speaks HTTP.
Controllers in the same process call `api` directly; its methods do not await, so that each is atomic.
"""
