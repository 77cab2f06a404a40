#!/usr/bin/env bash
# Stands before Python in a job (cluster.container): plays the trainer where the scheduler is what is tested, passes all
# other commands on. FAKE says what it does; it counts steps, obeys the stop file and "commits" every step.
case " $* " in
  *" launch.slurm.task "*) ;;
  *) exec "$@" ;;
esac
for word in "$@"; do
  case $word in
    run.root=*) root=${word#*=} ;;
    run.id=*) id=${word#*=} ;;
    steps=*) steps=${word#*=} ;;
  esac
done
run=$root/$id rank=$SLURM_PROCID
echo "rank $rank on $SLURMD_NODENAME, gpus ${CUDA_VISIBLE_DEVICES:-none}, restart ${SLURM_RESTART_COUNT:-0}, omp $OMP_NUM_THREADS"

say() { echo "{\"state\": \"$1\", \"step\": $2, \"exit_status\": ${3:-0}}" >"$run/status.json.new" && mv "$run/status.json.new" "$run/status.json"; }
commit() { mkdir -p "$run/checkpoints/step-$(printf %08d "$1")" && echo '{"files": {}}' >"$run/checkpoints/step-$(printf %08d "$1")/COMMITTED"; }
last() { find "$run/checkpoints" -name COMMITTED | sort | tail -n 1 | sed 's/.*step-0*\([0-9]*\).*/\1/'; }

begun() { echo "$(date +%s.%N) $SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} ${1:-0}" >>"$run/begun"; }

step=$(last)
step=${step:-0}
[ "$rank" -ne 0 ] || begun "$step"
case $FAKE in
  crash) exit 75 ;;
  killed) kill -KILL $$ ;;
  refuse)
    [ "$rank" -ne 0 ] || say failed "$step" 1
    exit 1
    ;;
esac
[ "$rank" -eq 0 ] || { while [ ! -e "$run/done-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" ]; do sleep 0.1; done; exit 0; }
say running "$step"
while [ "$step" -lt "$steps" ]; do
  if [ -e "$run/stop" ]; then
    say stopped "$step"
    touch "$run/done-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    exit 0
  fi
  sleep 0.2
  step=$((step + 1))
  commit "$step"
  [ "$FAKE" != "crash-later" ] || [ $((step % 3)) -ne 0 ] || exit 75
done
say finished "$step"
touch "$run/done-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
