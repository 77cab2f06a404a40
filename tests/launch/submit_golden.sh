#!/usr/bin/env bash
# Run big on SLURM. Written by `python -m launch`; `sbatch submit.sh` submits it again by hand.
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

run=/home/me/runs/big
code=/home/me/runs/big/code # what runs: a copy, taken at submission
python=(apptainer exec --nv 'my image.sif' python3)
job=$SLURM_JOB_ID
restart=${SLURM_RESTART_COUNT:-0}
echo "== job $job, restart $restart, on $SLURM_JOB_NODELIST, $(date '+%F %T')" >&2

# A signal comes before the time limit, at preemption and at scancel. Rank 0 sees the stop file at its next step, however
# early the signal came; the job and restart in it tell a later attempt that it is stale.
caught=
asked=
on_signal() {
  caught=1 asked=1
  [ -e "$run/stop" ] || echo "signal $job $restart" >"$run/stop"
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

export NCCL_SOCKET_IFNAME=ib0
export WORDS='it'"'"'s'

module purge
module load cuda

export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # the copy, not the folder that we are in
export MOVA_CODE="$code" MOVA_STARTED=1700000000
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

"${python[@]}" -m launch.job begin "$run" --job "$job" --restart "$restart" --nodes "$SLURM_JOB_NODELIST" \
  --max-restarts 200 --fruitless 3 --follows /home/me/runs/before
case $? in
  0) ;;
  3) exit 0 ;;
  *) exit 1 ;;
esac

# Ranks meet at the address of the first node, at a port that other jobs and earlier attempts do not use.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT=$((10000 + (job + 211 * restart) % 20000))
ends=$(squeue -h -j "$job" -o %e)
if [[ $ends == *T* ]]; then # else there is no time limit
  export MOVA_DEADLINE=$(date -d "$ends" +%s)
fi

status=0
# Every node is looked at before training. One that fails is named, and another job without it takes this one's place.
if [ -z "$asked" ]; then
  run_to_end timeout --kill-after=10 300 srun --nodes=2 --ntasks=2 --ntasks-per-node=1 \
    --kill-on-bad-exit=0 --open-mode=append --output=/home/me/runs/big/logs/%j-preflight.out \
    "${python[@]}" -m launch.preflight examine "$run" --job "$job" --restart "$restart" --gpus=8 --seconds=300 --free-gib=1 --matmul-tflops=500 --bandwidth-gbs=100
  if [ $? -ne 0 ] && [ -z "$asked" ]; then
    exclude=$("${python[@]}" -m launch.preflight judge "$run" --job "$job" --restart "$restart" --exclude 'bad[1-3]' \
      --most 8 $(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    if [ $? -eq 0 ]; then
      other=$(sbatch --parsable --exclude="$exclude" "$run/submit.sh") || exit 1
      other=${other%%;*}
      "${python[@]}" -m launch.job replaced "$run" --job "$job" --restart "$restart" --by "$other" --nodes "$exclude"
      squeue -h --me -t PENDING -o '%i %E' | sed 's/([a-z]*)//g' | while read -r waiting order; do
        case ",$order," in
          *":$job,"* | *":$job:"*)
            scontrol update "JobId=$waiting" "Dependency=$(sed -E "s/:$job([,:]|\$)/:$other\1/g" <<<"$order")"
            ;;
        esac
      done
      exit 0
    fi
    status=75 # no node could be blamed: the same job tries again
  fi
fi

if [ -z "$asked" ] && [ "$status" -eq 0 ]; then
  # USR2 is ignored until Python has its handler, which would otherwise kill the ranks while they start.
  run_to_end srun --kill-on-bad-exit=1 --open-mode=append --output=/home/me/runs/big/logs/%j-%t.out --cpus-per-task=12 --mpi=none \
    bash -c 'trap "" USR2; exec "$@"' bash "${python[@]}" -m launch.task \
    run.id=big \
    model=mova_360p \
    'data.path=shards/speech and music'
  status=$?
fi

"${python[@]}" -m launch.job end "$run" --job "$job" --restart "$restart" --status "$status" \
  --state "$(squeue -h -j "$job" -o %T)"
status=$?
echo "== job $job, restart $restart ends with status $status, $(date '+%F %T')" >&2
[ "$status" -ne 75 ] || exec scontrol requeue "$job" # it kills this script: nothing may follow
exit "$status"
