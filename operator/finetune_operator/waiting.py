"""Why a pod does not run, and what a person can do about it. Pure."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.status import Reason
from finetune_operator.observe import ChildPod, Conflict

NEEDS_SOMEBODY = {
    Reason.NAME_CONFLICT,
    Reason.PODS_REFUSED,
    Reason.UNSCHEDULABLE,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
}
"""What a job waits for that does not come by itself, so that an event says it too."""
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}


def for_pod(stage: Stage) -> tuple[Reason, str]:
    return Reason.WAITING_FOR_POD, f"Waiting for the {stage} pod to start."


def for_queue(job_name: str) -> tuple[Reason, str]:
    return Reason.QUEUED, (
        f"Job {job_name} is kept suspended by its queue, or by whoever set its spec.suspend; it goes on when that is "
        "taken back."
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
    if pod.waiting.reason == "Unschedulable":
        field = "resources, or widen spec.scheduling" if stage is Stage.TRAIN else f"stages.{stage}"
        return Reason.UNSCHEDULABLE, (
            f"No node can take pod {pod.name} ({pod.waiting.message}). Lower spec.{field}, or add nodes."
        )
    return Reason.WAITING_FOR_POD, f"Waiting for pod {pod.name} to start ({told})."
