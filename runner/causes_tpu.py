"""The table of causes, second part: the TPU itself, and hosts that belong to one job."""

from runner.cause import Cause, Sign

_LOCK_SOURCE = "own runs with libtpu 0.0.32.1; https://github.com/jax-ml/jax/issues/10192"

CAUSES = (
    Cause(
        id="tpu_busy_lockfile",
        depth=220,
        explanation="Another process holds the TPU or its lock file /tmp/libtpu_lockfile.",
        signs=(
            Sign(r"(?:TPU|libtpu(?:\.so)?) is already in use by|libtpu\.so already in use"),
            Sign(r"accessing libtpu multi-process lockfile"),
            Sign(r"/dev/(?:accel|vfio/)\d+\)?:? ?.{0,40}Device or resource busy"),
            Sign(r"Couldn't open iommu group", sure=False),
            Sign(r"sudo rm (?:-f )?/tmp/libtpu_lockfile"),
        ),
        details=(r"in use by (?:a )?process with pid (?P<pid>\d+)",),
        advice=(
            "Find the holder first: `headroom preflight`, or `lsof -w /dev/accel0 /dev/vfio/*"
            " /tmp/libtpu_lockfile`.",
            "If it is your own process, end that one by its id and wait until it is gone.",
            "Remove /tmp/libtpu_lockfile only when nobody holds the device or the file; the message"
            " says `sudo rm` also while a live job holds it, and following it there breaks that"
            " job.",
            "Keep probes, tests and launchers off the TPU (JAX_PLATFORMS=cpu), and never call"
            " jax.devices() in a launcher.",
        ),
        retry="after_clean_up",
        source=_LOCK_SOURCE,
        last=True,
    ),
    Cause(
        id="tpu_device_permission",
        depth=210,
        explanation="The process may not open the TPU's device files.",
        signs=(
            Sign(r"/dev/(?:accel|vfio)[\w/]*['\")]*:? ?.{0,30}(?:Operation not permitted)"),
            Sign(r"/dev/(?:accel|vfio)[\w/]*['\")]*:? ?.{0,30}[Pp]ermission denied"),
            Sign(r"(?:Operation not permitted|[Pp]ermission denied):? ?['\"(]*/dev/(?:accel|vfio)"),
        ),
        advice=(
            "Map the devices into the container (--device /dev/accel* or /dev/vfio/*, or"
            " --privileged), from the host: a container cannot discover them by itself.",
            "On the host, add the user to the group that owns the device, or run as root.",
        ),
        retry="after_clean_up",
        source="https://github.com/marin-community/marin/pull/3871",
    ),
    Cause(
        id="tpu_core_halt",
        depth=190,
        explanation="A TPU core stopped by itself: the hosts ran different programs, a kernel's"
        " check failed, or an earlier kill -9 left the chip in a bad state.",
        signs=(
            Sign(r"[Aa]ccelerator device halted|[Cc]ore halted unexpectedly"),
            Sign(r"halted (?:unexpectedly )?at tag:pc"),
            Sign(r"unexpected (?:peer|leader) shows up in the launch group"),
            Sign(r"in the launch group with a different launch id"),
            Sign(r"have halted with an unrecoverable error|RuntimeUnexpectedCoreHalt"),
            Sign(r"TensorCore(?:Sequencer)? .{0,30}halted|program continuator has halted"),
        ),
        details=(r"(?P<error_code>E\d{4}): ?\w+",),
        advice=(
            "Same XLA flags, same program, same jax and libtpu on every host; what decides the"
            " program (data, checkpoint step, compile cache) must not differ between hosts.",
            "If a job was killed with -9 before: restart the workers; stop jobs with SIGINT.",
            "Alone on one host and repeatable: a kernel's own check; run without custom kernels.",
        ),
        retry="after_clean_up",
        source="https://openxla.org/xla/errors/error_0200;"
        " https://github.com/marin-community/marin/issues/5319",
    ),
    Cause(
        id="tpu_slice_failure",
        depth=195,
        explanation="The slice as a whole is broken: a worker, a chip or the network between the"
        " chips failed.",
        signs=(
            Sign(r"SLICE_FAILURE_\w+"),
            Sign(r"[Ss]lice (?:is |health(?: is)? )?(?:un|not )healthy|[Ss]lice has failed"),
            Sign(r"TPU \S+ is (?:not HEALTHY|UNHEALTHY)|UNHEALTHY_(?:TENSORFLOW|MAINTENANCE)"),
            Sign(
                r"ICI (?:link|network).{0,40}(?:down|fail|error|unhealthy)|inter-chip .{0,30}down"
            ),
        ),
        details=(r"(?P<slice_failure>SLICE_FAILURE_\w+)",),
        advice=(
            "Look at the other workers' logs: the one that reports only noticed it.",
            "Try again once; if it comes back, recreate the TPU VM.",
        ),
        retry="retryable",
        source="MaxText, benchmarks/maxtest/getting_started.md; libtpu 0.0.32.1",
    ),
    Cause(
        id="tpu_init_other",
        depth=280,
        explanation="The TPU runtime did not start.",
        signs=(
            Sign(r"[Ii]nvalid --\S*worker_addresses specified|Expected \d+ worker addresses, got"),
            Sign(r"TPU initialization failed"),
            Sign(r"Failed to get global TPU topology"),
            Sign(r"No \w+ device found\."),
            Sign(r"Unable to initialize backend '?tpu\b"),
            Sign(r"No TPU (?:P|p)latform (?:available|found|registered)"),
            Sign(
                r"Failed to (?:get|find|fetch|retrieve).{0,40}TPU (?:metadata|chip|device|worker)"
            ),
            Sign(
                r"[Nn]o TPU devices? (?:were |was )?found|no TPUs? (?:is "
                r"|are )?(?:visible|attached)"
            ),
            Sign(r"Failed to initialize (?:the )?TPU|TPU backend .{0,30}(?:fail|not available)"),
            Sign(r"[Ff]ailed to (?:connect|get).{0,40}(?:tpu-env|metadata\.google\.internal)"),
            Sign(r"Requested backend '?tpu\w*'?, but it failed to initialize"),
            Sign(r"Backend 'tpu' (?:failed to initialize|is not in the list of known backends)"),
        ),
        details=(r"Expected (?P<expected_workers>\d+) worker addresses, got (?P<got_workers>\d+)",),
        advice=(
            "No device found: is this a TPU VM, and are /dev/accel* or /dev/vfio/* in the"
            " container? `headroom preflight` tells.",
            "In a container the TPU_* variables come from the metadata server: use the host's"
            " network, or pass them in.",
            "Expected N worker addresses, got M: start all workers of the slice, or set"
            " TPU_WORKER_HOSTNAMES and TPU_WORKER_ID; it can also be the wrong libtpu.",
        ),
        retry="after_clean_up",
        source="https://github.com/huggingface/transformers/issues/28204; own runs",
        last=True,
    ),
    Cause(
        id="tpu_cpu_fallback",
        depth=810,
        explanation="The TPU was not found and JAX went on with the CPU, silently.",
        signs=(
            Sign(r"No (?:GPU/)?TPU found.{0,20}[Ff]alling back to (?:the )?CPU", quiet=True),
            Sign(
                r"TPU.{0,200}[Ff]alling back to (?:the )?(?:CPU|cpu)|TPU .{0,40}using (?:the )?CPU",
                quiet=True,
            ),
            Sign(r"Unable to initialize backend '?tpu'?:", quiet=True, sure=False),
            Sign(r"Failed to open libtpu\.so", quiet=True, sure=False),
        ),
        because=("tpu_busy_lockfile", "tpu_device_permission"),
        advice=(
            "Set JAX_PLATFORMS=tpu on hardware: then JAX refuses instead of falling back.",
            "Look for the reason in the line: no device, a held lock, a missing libtpu.",
        ),
        retry="after_clean_up",
        source="own runs with jax 0.8.2: exit status 0, nothing but an INFO line",
    ),
    Cause(
        id="multihost_missing_worker",
        depth=500,
        explanation="A partner of this job did not come, or went away: another worker or the"
        " coordinator.",
        signs=(
            Sign(r"cluster registration failed"),
            Sign(r"Barrier timed out"),
            Sign(r"/task:\d+ heartbeat timeout|tasks? (?:are )?unhealthy \(stopped sending heartb"),
            Sign(r"JAX distributed service detected fatal errors"),
            Sign(r"RegisterTask|Wait_for_all_tasks_to_register"),
            Sign(r"Gloo \w+ failed|[Gg]loo/transport"),
            Sign(r"has been set to ERROR in coordination service"),
            Sign(r"(?:coordination|distributed) service.{0,120}(?:DEADLINE_EXCEEDED|UNAVAILABLE)"),
            Sign(r"Did you run your code on all TPU hosts", sure=False),
            Sign(r"Failed to send RPC to coordination service"),
            Sign(r"GetKeyValue\(\) timed out"),
            Sign(r"[Ff]ailed to connect to (?:the )?(?:distributed )?coordinator"),
            Sign(r"Some tasks? (?:crashed|failed|did not)|tasks? failed to (?:join|reach|connect)"),
            Sign(r"NCCL .{0,60}(?:timeout|timed out|unhandled system error|remote process exited)"),
            Sign(
                r"Shutdown barrier (?:has )?(?:failed|timed out)|preempted, or crashed unexpectedly"
            ),
        ),
        details=(
            r"currently set to:? (?P<timeout_seconds>\d+(?:\.\d+)?[hms](?:\d+m)?(?:\d+s)?)",
            r"/task:(?P<task>\d+) heartbeat timeout",
            r"task:(?P<task>\d+) has been set to ERROR",
        ),
        advice=(
            "Look at the other workers' logs first: a crash there comes before this line.",
            "Start all workers with the same coordinator address, process count and job; one that"
            " was never started looks the same as one that crashed.",
            "Long compiles: raise the heartbeat and initialization timeouts"
            " (JAX_COORDINATION_SERVICE_HEARTBEAT_TIMEOUT_SECONDS=1200,"
            " jax.distributed.initialize(initialization_timeout=...)).",
        ),
        retry="retryable",
        source="https://github.com/marin-community/levanter/issues/432;"
        " https://github.com/GoogleCloudPlatform/ml-auto-solutions/pull/1166",
    ),
    Cause(
        id="preempted",
        depth=550,
        explanation="The cloud took the VM, or announced that it will.",
        signs=(
            Sign(r"preemption_notifier\S* SIGTERM caught", quiet=True, sure=False),
            Sign(r"preemption sync point|preemption (?:notice|event|signal|warning)", quiet=True),
            Sign(r"(?:state|status)[:=\"' ]+PREEMPTED|\bis PREEMPTED\b|\(PREEMPTED\)", quiet=True),
            Sign(r"(?:was|were|been|being|is) preempted\b(?!/)", quiet=True),
            Sign(
                r"compute\.instances\.preempted|TERMINATE_ON_HOST_MAINTENANCE"
                r"|termination is imminent",
                quiet=True,
            ),
            Sign(r"preemptible .{0,40}(?:terminated|reclaimed|stopped)", quiet=True, sure=False),
            Sign(r"(?:[Ss]pot|[Pp]reemptible) (?:VM|instance|TPU).{0,40}reclaimed", quiet=True),
        ),
        advice=(
            "Start again on a new VM from the last checkpoint; nothing in the job is wrong.",
            "Check for preemption in the loop (multihost_utils.reached_preemption_sync_point) and"
            " save there.",
        ),
        retry="retryable",
        source="own runs with jax 0.8.2",
    ),
)
