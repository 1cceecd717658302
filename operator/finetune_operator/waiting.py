"""Why a pod does not run, and what a person can do about it. Pure."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.status import Reason
from finetune_operator.observe import ChildJob, ChildPod, Conflict, Waiting, Workload

NEEDS_SOMEBODY = {
    Reason.NAME_CONFLICT,
    Reason.PODS_REFUSED,
    Reason.UNSCHEDULABLE,
    Reason.QUEUE_MISSING,
    Reason.VOLUME_NOT_READY,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
}
"""What a job waits for that does not come by itself, so that an event says it too."""
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}


def for_pod(stage: Stage) -> tuple[Reason, str]:
    return Reason.WAITING_FOR_POD, f"Waiting for the {stage} pod to start."


def for_queue(child: ChildJob, workload: Workload | None, no_kueue: bool) -> tuple[Reason, str]:
    """The Job is suspended, and not by us."""
    if not child.queue:
        return Reason.QUEUED, (
            f"Somebody has suspended Job {child.name}; it goes on when its spec.suspend is set back to false."
        )
    if no_kueue:
        return Reason.QUEUE_MISSING, (
            f"Job {child.name} waits for queue {child.queue}, and the cluster does not know Kueue. Install Kueue, or "
            "suspend the job and remove scheduling.queueName and cpuQueueName."
        )
    if workload is None:
        return Reason.QUEUED, f"Waiting for Kueue to see Job {child.name} in queue {child.queue}."
    if not workload.active:
        return Reason.QUEUED, (
            f"Workload {workload.name} was taken out of queue {child.queue}. Set its spec.active to true to put it "
            "back."
        )
    place = f", position {workload.position}," if workload.position else ""
    why = f": {workload.message}" if workload.message else "."
    return Reason.QUEUED, f"Workload {workload.name}{place} waits in queue {child.queue}{why}"


def for_containers(pod: ChildPod, why: Waiting) -> tuple[Reason, str]:
    """The pod has a node, which cannot create its containers yet."""
    if why.reason == "FailedCreatePodSandBox":
        return Reason.WAITING_FOR_POD, f"Waiting for pod {pod.name} to start ({why.reason}: {why.message})."
    return _for_volumes(pod, why.message)


def _for_volumes(pod: ChildPod, why: str) -> tuple[Reason, str]:
    return Reason.VOLUME_NOT_READY, (
        f"Pod {pod.name} waits for its volumes: {why} Create what is missing; it is tried again by itself."
    )


def for_name(conflict: Conflict) -> tuple[Reason, str]:
    """The name of a child is taken."""
    if conflict.stale:
        reason, text = Reason.WAITING_FOR_CLEANUP, "is still being removed after an earlier job of this name."
    else:
        reason = Reason.NAME_CONFLICT
        text = f"belongs to {conflict.owner}, so it is not touched: delete it, or rename the job."
    return reason, f"{conflict.kind} {conflict.name} {text}"


def for_admission(name: str, why: str) -> tuple[Reason, str]:
    """The cluster refuses the pod."""
    return Reason.PODS_REFUSED, (
        f"The cluster refuses the pod of Job {name}: {why}. Mend the quota, policy or webhook that it names; it is "
        "tried again by itself."
    )


def for_start(pod: ChildPod, stage: Stage) -> tuple[Reason, str]:
    """What the pod itself says."""
    assert pod.waiting is not None
    told = f"{pod.waiting.reason}: {pod.waiting.message}" if pod.waiting.message else pod.waiting.reason
    if pod.waiting.reason in _IMAGE_REASONS:
        return Reason.IMAGE_PULL_FAILED, (
            f"Pod {pod.name} cannot get its image ({told}). Check podTemplate.image or the operator's trainer image, "
            "and the pull secrets."
        )
    if pod.waiting.reason in _CONFIG_REASONS:
        return Reason.CONTAINER_CONFIG_ERROR, (
            f"Pod {pod.name} cannot start ({told}). Create what it names, for example the Secret of storage.secretRef."
        )
    if pod.waiting.reason == "Unschedulable" and _is_about_claims(pod.waiting.message):
        # The scheduler says it before any node does.
        return _for_volumes(pod, pod.waiting.message)
    if pod.waiting.reason == "Unschedulable":
        field = "resources, or widen spec.scheduling" if stage is Stage.TRAIN else f"stages.{stage}"
        return Reason.UNSCHEDULABLE, (
            f"No node can take pod {pod.name} ({pod.waiting.message}). Lower spec.{field}, or add nodes."
        )
    return Reason.WAITING_FOR_POD, f"Waiting for pod {pod.name} to start ({told})."


def _is_about_claims(message: str) -> bool:
    """A claim is missing or unbound. One that the cluster itself is about to create is not."""
    return "persistentvolumeclaim" in message.lower() and "ephemeral volume controller" not in message
