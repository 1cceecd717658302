"""A control plane in one process: API server, Job controller and runner of pods. For one machine, and for tests."""
