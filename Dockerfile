# The two images of the project:
#
#   docker build --target operator --tag ghcr.io/finetune-operator/operator .
#   docker build --target trainer --tag ghcr.io/finetune-operator/trainer .

ARG BASE=docker.io/library/python:3.11-slim-bookworm
# More options of pip, for example --index-url=...
ARG PIP_OPTIONS=""


FROM ${BASE} AS base
# HOME and USER: pods run as a number that no /etc/passwd knows, and libraries ask for both.
ENV HOME=/tmp \
    USER=finetune \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
COPY constraints.txt /build/


FROM base AS wheel
ARG PIP_OPTIONS
COPY . /src
RUN pip wheel ${PIP_OPTIONS} --no-deps --wheel-dir /build /src


FROM base AS operator
ARG PIP_OPTIONS
COPY --from=wheel /build/*.whl /build/
RUN pip install ${PIP_OPTIONS} --constraint /build/constraints.txt "$(echo /build/*.whl)[operator]"
# A number, so that the kubelet can see that it is not root. Any other does as well.
USER 65532:65532
ENTRYPOINT ["finetune-operator"]
# Last, since they differ in each build.
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-operator" \
      org.opencontainers.image.description="Turns FineTuneJobs into tuned, merged and verified models in S3" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM base AS trainer
ARG PIP_OPTIONS
# Before our own code, which changes more often: torch and the CUDA libraries that it brings are nearly the whole image,
# and all that a GPU needs beside the node's driver. Another build of it: torch==2.13.0+cpu, with --extra-index-url above.
ARG TORCH="torch==2.13.0"
RUN pip install ${PIP_OPTIONS} --constraint /build/constraints.txt "${TORCH}"
COPY --from=wheel /build/*.whl /build/
RUN pip install ${PIP_OPTIONS} --constraint /build/constraints.txt "$(echo /build/*.whl)[trainer]"
USER 65532:65532
ENTRYPOINT ["finetune-trainer"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer" \
      org.opencontainers.image.description="Prepares, trains and exports as the job document of its pod says" \
      org.opencontainers.image.source="https://github.com/finetune-operator/finetune-operator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
