"""Addresses of pods on this machine, and the names that a cluster's DNS would have for them.

On Linux every pod has a loopback address of its own. No resolver knows the names of pods, so that the address of a pod
with a name follows from the name: whoever is told the name can be told the address instead, even before the pod is
there.
"""

from __future__ import annotations

import hashlib
import re
import sys

from finetune_operator.local.apiserver.store import Object

_HOST = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def loopback(seed: str) -> str:
    """The address that belongs to a text."""
    if sys.platform != "linux":
        return "127.0.0.1"
    first, second, third, *_ = hashlib.sha256(seed.encode()).digest()
    # 127.0.0.0/16 is left to others: 127.0.0.1 is everybody's, 127.0.1.1 Debian's host name.
    return f"127.{1 + first % 254}.{second}.{1 + third % 254}"


def named_address(pod: Object) -> str | None:
    """The address of a pod that has a name: a host name, and that of a Service."""
    spec = pod["spec"]
    if "hostname" not in spec or "subdomain" not in spec:
        return None
    return loopback(f"{pod['metadata']['namespace']}/{spec['hostname']}.{spec['subdomain']}")


def resolved(text: str, pod: Object) -> str:
    """The address, where the text is the name of a pod behind the same Service; else the text itself."""
    host, _, service = text.partition(".")
    if not _HOST.fullmatch(host) or service != pod["spec"].get("subdomain"):
        return text
    return loopback(f"{pod['metadata']['namespace']}/{text}")
