#!/usr/bin/env bash
# Trains in the pods of a Kubernetes JobSet, one process a pod.
#
#   IMAGE=IMAGE CLAIM=CLAIM [NAME=outplay] [PODS=2] [CPUS=8] [MEMORY=32Gi] \
#     [GPUS=0] [RESTARTS=0] [DRY_RUN=1] jobset.sh --workdir=/shared/DIR [FLAGS]
#
# IMAGE has the suite in its working folder and its Python on PATH; CLAIM is a
# volume claim that all pods may write (ReadWriteMany), mounted at /shared;
# CPUS, MEMORY and GPUS are those of a pod. FLAGS are those of
# experiments.train. DRY_RUN=1 prints the manifest, and refuses what the launcher
# would.
#
# Pods that are evicted or preempted, or that stop with 143 because a peer was,
# are made again and count for nothing. A refusal (2) fails the set at once; any
# other fault starts all pods again, RESTARTS times.
set -euo pipefail

: "${IMAGE:?the container image}" "${CLAIM:?the shared volume claim}"
NAME=${NAME:-outplay}
PODS=${PODS:-2} CPUS=${CPUS:-8} MEMORY=${MEMORY:-32Gi} GPUS=${GPUS:-0}
RESTARTS=${RESTARTS:-0}
for field in PODS CPUS GPUS RESTARTS; do
  if [[ ! ${!field} =~ ^[0-9]{1,6}$ ]]; then
    echo "error: $field=${!field}: must be a whole number" >&2
    exit 2
  fi
done
if ((PODS < 1 || CPUS < 1)); then
  echo "error: PODS=$PODS, CPUS=$CPUS: must be at least 1" >&2
  exit 2
fi
if [[ ! $MEMORY =~ ^[0-9]+([EPTGMK]i?)?$ ]]; then
  echo "error: MEMORY=$MEMORY: must be an amount, as in 32Gi" >&2
  exit 2
fi
# A part of the pods' host names.
if [[ ! $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
  echo "error: NAME=$NAME: must be at most 40 of a to z, 0 to 9 and -" >&2
  exit 2
fi
case " $* " in
  *" --workdir=/shared/"*) ;;
  *) echo 'error: --workdir=/shared/DIR is missing: the pods share /shared' >&2
     exit 2 ;;
esac

quoted() { # as YAML's double-quoted scalars
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
    - action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: train
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $PODS
        completions: $PODS
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
          - action: Ignore
            onPodConditions:
            - type: DisruptionTarget
              status: "True"
          - action: Ignore
            onExitCodes:
              containerName: train
              operator: In
              values: [143]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            containers:
            - name: train
              image: $(quoted "$IMAGE")
              command:
              - python
              - -m
              - experiments.train
$(for flag in "$@"; do echo "              - $(quoted "$flag")"; done)
              env:
              - name: OUTPLAY_COORDINATOR
                value: "$NAME-train-0-0.$NAME:8476"
              - name: OUTPLAY_NUM_PROCESSES
                value: "$PODS"
              - name: OUTPLAY_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: "metadata.annotations\
['batch.kubernetes.io/job-completion-index']"
              resources:
                requests:
                  cpu: "$CPUS"
                  memory: $(quoted "$MEMORY")
                limits:
                  memory: $(quoted "$MEMORY")
                  nvidia.com/gpu: "$GPUS"
              volumeMounts:
              - name: shared
                mountPath: /shared
            volumes:
            - name: shared
              persistentVolumeClaim:
                claimName: $(quoted "$CLAIM")
YAML
}

if [[ ${DRY_RUN:-} ]]; then
  # The folder is the pods'; all else can be looked at here.
  JAX_PLATFORMS=cpu "${CHECK_PYTHON:-.venv/bin/python}" -m experiments.train \
    "$@" "--workdir=${TMPDIR:-/tmp}/outplay-check" --check >/dev/null
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
