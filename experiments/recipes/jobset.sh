#!/usr/bin/env bash
# Trains in the pods of a Kubernetes JobSet, one process a pod.
#
#   IMAGE=IMAGE CLAIM=CLAIM [NAME=outplay] [PODS=2] [GPUS=0] [RESTARTS=0] \
#     [DRY_RUN=1] jobset.sh --workdir=/shared/DIR [FLAGS]
#
# IMAGE has the suite in its working folder and its Python on PATH; CLAIM is a
# volume claim that all pods may write (ReadWriteMany), mounted at /shared;
# GPUS counts those of a pod. FLAGS are those of experiments.train. DRY_RUN=1
# prints the manifest.
set -euo pipefail

: "${IMAGE:?the container image}" "${CLAIM:?the shared volume claim}"
NAME=${NAME:-outplay}
PODS=${PODS:-2}
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
    maxRestarts: ${RESTARTS:-0}
  replicatedJobs:
  - name: train
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $PODS
        completions: $PODS
        backoffLimit: 0
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
                limits:
                  nvidia.com/gpu: ${GPUS:-0}
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
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
