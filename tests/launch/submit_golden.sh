#!/usr/bin/env bash
# Run big on SLURM. Written by `mova launch`; `sbatch submit.sh` submits it again by hand.
#SBATCH --job-name=big
#SBATCH --chdir=/home/me
#SBATCH --output=/home/me/runs/big/logs/%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --gres=gpu:h100:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --time=1-00:00:00
#SBATCH --partition=batch
#SBATCH --account=research
#SBATCH --qos=high
#SBATCH --constraint=ib&nvme
#SBATCH --reservation=week
#SBATCH --exclude=bad[1-3]
#SBATCH --comment="two words"

# What the shell or the job that submitted this one left in the environment must not reach it. (SLURM_EXPORT_ENV: under
# sbatch --export=NONE srun would give its tasks nothing of what follows.)
unset ${!SBATCH_@} ${!SRUN_@} ${!PMIX_@} ${!PMI_@} ${!PMI2_@} ${!OMPI_COMM_WORLD_@} ${!MOVA_@} ${!TORCHELASTIC_@} \
  CUDA_VISIBLE_DEVICES SLURM_EXPORT_ENV RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

# Asks SLURM until it answers, for ten minutes: its controller may be restarting, which says nothing of the job.
ask() {
  local answer= pause
  for pause in 1 2 5 10 20 40 60 60 60 60 60 60 60 60 60; do
    answer=$("$@" 2>/dev/null) && [ -n "$answer" ] && break
    sleep "$pause"
  done
  echo "$answer"
}

# Asks for another attempt of a job, which ends this script; returns when that is refused for ten minutes.
requeue() {
  local pause
  for pause in 1 2 5 10 20 40 60 60 60 60 60 60 60 60 60; do
    scontrol requeue "$1" && exit 0
    sleep "$pause"
  done
}

# Runs a command without the variables of this job.
as_from_a_new_shell() (
  conf=${SLURM_CONF:-}
  unset ${!SLURM_@} ${!SLURMD_@} ${!MOVA_@}
  [ -z "$conf" ] || export SLURM_CONF="$conf"
  exec "$@"
)

run=/home/me/runs/big
code=/home/me/runs/big/code # what runs: a copy, taken at submission
python=(apptainer exec --nv 'my image.sif' python3)
job=$SLURM_JOB_ID
restart=$(ask scontrol show job -o "$job" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
export SLURM_RESTART_COUNT=${restart:=${SLURM_RESTART_COUNT:-0}} # the variable alone may be another job's
echo "== job $job, restart $restart, on $SLURM_JOB_NODELIST, $(date '+%F %T')" >&2

# A signal comes before the time limit, at preemption and at scancel. Rank 0 sees the stop file at its next step, however
# early the signal came; the job and restart in it tell a later attempt that it is stale.
caught=
asked=
on_signal() {
  caught=1 asked=1
  [ -e "$run/stop" ] || echo "signal $job $restart" >"$run/stop" || { # on a full disk it would be empty, and a user's
    rm -f "$run/stop"
    scancel --signal=USR2 "$job"
  }
}
trap on_signal USR2 TERM

# Runs a command to its end, though signals come meanwhile (they would end a plain `wait`).
run_to_end() {
  "$@" &
  local child=$! status=0
  while :; do
    caught=
    wait "$child" && status=0 || status=$?
    [ -n "$caught" ] || return "$status"
  done
}

# The jobs that wait for job $1 wait for job $2 from here on.
move_dependents() {
  local waiting order
  squeue -h --me -t PENDING -o '%i %E' | sed 's/([a-z]*)//g' | while read -r waiting order; do
    case ",$order," in
      *":$1,"* | *":$1:"*)
        scontrol update "JobId=$waiting" "Dependency=$(sed -E "s/:$1([,:]|\$)/:$2\1/g" <<<"$order")"
        ;;
    esac
  done
}

# Without room on its disk, or with its folder away, the run waits in the queue: as another job, which begins after a
# pause and is told since when the run waits.
since=${1:-}
[ "$restart" -eq 0 ] || since= # it is of this job's first start
if [ -n "$since" ] && (: >>"$run/logs/$job.out") 2>/dev/null; then exec >>"$run/logs/$job.out" 2>&1; fi
wait_for_room() {
  local now pause exclude other
  case $(ask squeue -h -j "$job" -o %T) in RUNNING | "") ;; *) exit 1 ;; esac # it was cancelled
  now=$(date +%s)
  pause=$((now - ${since:=$now}))
  if [ "$pause" -ge 86400 ]; then
    echo "run $run is given up: not writable for $pause s (cluster.disk_wait_hours)" >&2
    exit 1
  fi
  [ "$pause" -gt 60 ] || pause=60
  [ "$pause" -lt 1800 ] || pause=1800
  exclude=$(scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')
  other=$(ask as_from_a_new_shell sbatch --parsable --begin="now+$pause" --output=/dev/null \
    --comment="waits for room: $run" ${exclude:+"--exclude=$exclude"} "$0" "$since")
  other=${other%%;*}
  [ -n "$other" ] || { requeue "$job" && exit 1; }
  echo "== cannot write: job $other continues in $pause s" >&2
  [ ! -e "$run/config.yaml" ] ||
    "${python[@]}" -m launch.slurm.job waits "$run" --job "$job" --restart "$restart" --by "$other"
  move_dependents "$job" "$other"
  exit 0
}

export NCCL_SOCKET_IFNAME=ib0
export WORDS='it'"'"'s'

module purge
module load cuda

export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # the copy, not the folder that we are in
export MOVA_CODE="$code" MOVA_STARTED=1700000000
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# Without it memory of one size is lost to another: clips of several lengths follow each other.
[ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
echo "allocator: ${PYTORCH_CUDA_ALLOC_CONF:-$PYTORCH_ALLOC_CONF}" >&2

MOVA_ATTEMPT=$("${python[@]}" -m launch.slurm.job begin "$run" --job "$job" --restart "$restart" --nodes "$SLURM_JOB_NODELIST" \
  --max-restarts 200 --max-failed-restarts 3 --follows /home/me/runs/before ${since:+--waited})
case $? in
  0) ;;
  3) exit 0 ;;
  73) wait_for_room ;;
  *) if [ -e "$run/config.yaml" ]; then exit 1; else wait_for_room; fi ;;
esac
export MOVA_ATTEMPT # of this submission: 0 is the one that somebody asked for

# Ranks meet at the address of the first node, at a port that other jobs and earlier attempts do not use.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT=$((10000 + (job + 211 * restart) % 20000))
ends=$(ask squeue -h -j "$job" -o %e)
if [[ $ends == *T* ]]; then
  export MOVA_DEADLINE=$(date -d "$ends" +%s)
elif [ -z "$ends" ] && [ -n "${SLURM_JOB_END_TIME:-}" ]; then # no answer: as it was when the job started
  export MOVA_DEADLINE=$SLURM_JOB_END_TIME
fi # else there is no time limit

status=0
# Every node is looked at before training. One that fails is named, and another job without it takes this one's place.
if [ -z "$asked" ]; then
  run_to_end timeout --kill-after=10 300 srun --nodes=2 --ntasks=2 --ntasks-per-node=1 \
    --kill-on-bad-exit=0 --open-mode=append --output=/home/me/runs/big/logs/%j-preflight.out \
    "${python[@]}" -m launch.slurm.preflight examine "$run" --job "$job" --restart "$restart" --gpus=8 --world=16 --seconds=300 --free-gib=1 --matmul-tflops=500 --bandwidth-gbs=100
  if [ $? -ne 0 ] && [ -z "$asked" ]; then
    exclude=$("${python[@]}" -m launch.slurm.preflight judge "$run" --job "$job" --restart "$restart" --exclude 'bad[1-3]' \
      --most 8 $(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    if [ $? -eq 0 ]; then
      other=$(as_from_a_new_shell sbatch --parsable --exclude="$exclude" "$run/submit.sh") || exit 1
      other=${other%%;*}
      "${python[@]}" -m launch.slurm.job replaced "$run" --job "$job" --restart "$restart" --by "$other" --nodes "$exclude"
      move_dependents "$job" "$other"
      exit 0
    fi
    status=75 # no node could be blamed: the same job tries again
  fi
fi

if [ -z "$asked" ] && [ "$status" -eq 0 ]; then
  # USR2 is ignored until Python has its handler, which would otherwise kill the ranks while they start.
  run_to_end srun --kill-on-bad-exit=1 --open-mode=append --output=/home/me/runs/big/logs/%j-%t.out --cpus-per-task=12 --mpi=none \
    bash -c 'trap "" USR2; exec "$@"' bash "${python[@]}" -m launch.slurm.task \
    run.id=big \
    model=mova_360p \
    'data.path=shards/speech and music'
  status=$?
fi

said=$("${python[@]}" -m launch.slurm.job end "$run" --job "$job" --restart "$restart" --status "$status" \
  --state "$(ask squeue -h -j "$job" -o %T)")
status=$?
[ "$said" != anew ] || since=
echo "== job $job, restart $restart ends with status $status, $(date '+%F %T')" >&2
if [ "$status" -eq 73 ] || [ ! -e "$run/config.yaml" ]; then wait_for_room; fi
[ "$status" -ne 75 ] || requeue "$job"
exit "$status"
