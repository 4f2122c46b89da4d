# Sourced on every node before `ray start`, in the checkout: by bash, as `source deploy/node.sh head` or `source deploy/node.sh worker`.
# What it exports is inherited by Ray and by every job.
set -a
PATH="$PWD/.venv/bin:$PATH"
PYTHONPATH="$PWD"           # the mounted checkout, for workers too; the working directory of a job comes before it
RAY_AUTH_MODE=token         # nobody without the token may talk to Ray: it starts any command
RAY_USAGE_STATS_ENABLED=0   # nothing is sent anywhere
RAY_JOB_STOP_WAIT_TIME_S=60 # from SIGTERM to SIGKILL at `ray job stop`; jobs need about 2 s, where cores or storage are busy more than 15
RAY_raylet_start_wait_time_s=120 # a small machine that starts all at once needs longer than 30 s
NCCL_DEBUG=WARN             # says which interface failed, and nothing while all is well
NCCL_SOCKET_IFNAME='^lo,docker' # all interfaces but these
set +a

# the token: made once on the head, copied to the workers by the cluster file, readable by its owner only
if [ "$1" = head ]; then
  (umask 077 && ray get-auth-token --generate >/dev/null 2>&1)
  (umask 077 && python deploy/environment.py ~/ray_bootstrap_config.yaml >~/.clipq_environment) || return 1
fi
chmod 600 ~/.ray/auth_token || return 1
set -a
[ ! -e ~/.clipq_environment ] || . ~/.clipq_environment
set +a

# At the first boot the GPU driver may come up after SSH: Ray counts GPUs once, when it starts, and would count none.
if lspci 2>/dev/null | grep -qi nvidia || [ -e /proc/driver/nvidia/version ]; then
  for i in $(seq 150); do
    nvidia-smi -L >/dev/null 2>&1 && break
    [ "$i" -lt 150 ] || { echo "node: the GPU driver did not come up within 5 minutes; see: nvidia-smi" >&2; return 1; }
    sleep 2
  done
fi

# many workers mean many sockets; where 65,536 are not allowed, as many as are
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
