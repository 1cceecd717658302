"""The operator: knows Kubernetes, never imports torch.

`plan` is the heart: a pure function from what was asked and what was seen to what should be. `observe`, `classify`,
`status` and `children` are its parts, all pure; `reconcile` is the only module that sequences I/O, `kube` the only one
that speaks to the API server, `handlers` the only one that knows kopf.
"""
