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
