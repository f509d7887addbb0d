"""The table of causes, last part: what is known only by the way a program ended."""

from runner.cause import Cause, Sign

CAUSES = (
    Cause(
        id="interrupted",
        depth=560,
        explanation="Somebody stopped it from the keyboard or with SIGINT.",
        signs=(
            Sign(r"^\W*(?:\S+: )?KeyboardInterrupt\b", quiet=True),
            Sign(
                r"(?:received|caught|got) SIGINT|SIGINT received|User interrupted"
                r"|interrupted by (?:the )?user",
                quiet=True,
            ),
            Sign(
                r"^\s*\^C|^Aborted!$|Aborted by user|[Cc]ancell?ed by user", quiet=True, sure=False
            ),
        ),
        advice=("Start it again when it is wanted.",),
        retry="not_as_is",
        source="own runs",
    ),
    Cause(
        id="trainer_hang",
        depth=540,
        explanation="Nothing went on for as long as the job allows (stuck_after_s), and the trainer"
        " ended itself with the stacks of its threads.",
        signs=(Sign(r"^Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!", quiet=True),),
        advice=(
            "The stacks after that line tell where each thread waited, most recent call first: a"
            " file or a socket that never answers, a device, a collective of which a worker is"
            " missing.",
            "A phase that is only long (a first compile, a large evaluation) wants a larger"
            " stuck_after_s; 0 switches the watch off.",
        ),
        retry="retryable",
        source="own runs with Python's faulthandler",
    ),
    Cause(
        id="timeout",
        depth=570,
        explanation="A time limit was over before the program was done.",
        signs=(
            Sign(r"\"rc\": 124\b", sure=False),
            Sign(r"DUE TO TIME LIMIT|exceeded (?:the )?(?:wall ?(?:clock )?)?time ?limit"),
            Sign(r"TimeoutExpired: .*|timed out after [\d.]+ ?(?:s|sec|m|min|h)"),
            Sign(r"[Aa]sync task did not complete within|Timeout \(\d+s\) waiting for"),
            Sign(r"^\W*(?:\S*\.)?(?:TimeoutError|asyncio\.\S*TimeoutError)\b", sure=False),
            Sign(
                r"[Tt]imed? ?out (?:while )?waiting for|did not (?:start|become ready"
                r"|finish) within"
            ),
            Sign(
                r"[Ww]atchdog (?:timeout|timer|triggered)|[Jj]ob (?:execution )?timed out",
                sure=False,
            ),
        ),
        advice=(
            "Was it slow or stuck? steps.jsonl tells when the last step ended; a first TPU compile"
            " can take many minutes without a line.",
            "Raise the limit, or make the compile shorter (fewer engine paddings, compile cache).",
        ),
        retry="not_as_is",
        source="own runs with timeout(1)",
        exit_code=True,
    ),
    Cause(
        id="native_crash",
        depth=580,
        explanation="Native code (libtpu, XLA, an extension) crashed; Python could not catch it.",
        signs=(
            Sign(r"^F\d{4} \d\d:\d\d:\d\d\.\d+ \d+ \S+(?:\.cc:|\.cpp:|\.h:)\d+\]"),
            Sign(r"^(?:\S+ )?F \S+\.cc(?::\d+)?\] .*|Non-OK-status: |Check failed: "),
            Sign(r"SIG(?:SEGV|ABRT|BUS|FPE|ILL)\b|[Ss]egmentation fault|Fatal Python error"),
            Sign(r"\*\*\* Check failure stack trace|core dumped|terminate called after throwing"),
            Sign(r"Illegal instruction|double free or corruption|malloc\(\): |free\(\): invalid"),
            Sign(r"^\W*(?:Aborted|Bus error)\b(?!!)", sure=False),
            Sign(r"FATAL: exception not rethrown|LLVM ERROR"),
        ),
        advice=(
            "The first line of the crash names file and check: search for it with the libtpu and"
            " jax versions of the manifest.",
            "Rule out a version mix (`pip check`), then a smaller program, then a bad chip.",
        ),
        retry="not_as_is",
        source="own runs",
        exit_code=True,
    ),
    Cause(
        id="container_killed",
        depth=600,
        explanation="The process was killed from outside (SIGTERM and then SIGKILL), not by the"
        " kernel's OOM killer: docker stop, a lost VM, an operator, or the engine's own SIGKILL.",
        signs=(
            Sign(r"\"rc\": (?:137|143)\b", quiet=True, sure=False),
            Sign(
                r"SIGTERM (?:caught|received)|[Rr]eceived (?:signal )?(?:15|SIGTERM)",
                quiet=True,
                sure=False,
            ),
            Sign(
                r"exited with code (?:137|143)|ExitCode[=\": ]+(?:137|143)\b",
                quiet=True,
                sure=False,
            ),
            Sign(
                r"[Kk]illed by signal (?:9|15)|terminated by signal (?:9|15)"
                r"|died with .{0,20}SIG(?:KILL|TERM)",
                quiet=True,
                sure=False,
            ),
            Sign(
                r"\bexit(?:_status|_code|ed| code| status)?[=: ]+(?:137|143)\b",
                quiet=True,
                sure=False,
            ),
        ),
        advice=(
            "Who stopped it? `docker inspect` (OOMKilled, FinishedAt), `journalctl -k`, the"
            " scheduler. Exit status 137 alone means nothing: sglang-jax kills itself so as well.",
            "jax.distributed swallows SIGTERM (preemption service): set"
            " JAX_ENABLE_PREEMPTION_SERVICE=false, or poll reached_preemption_sync_point.",
        ),
        retry="retryable",
        source="own runs with docker and jax 0.8.2",
        exit_code=True,
    ),
    Cause(
        id="unknown_exception",
        depth=800,
        explanation="A Python exception that the table of causes does not know.",
        signs=(),
        advice=("Read the traceback from its first exception on: that is where it began.",),
        retry="not_as_is",
        source="",
    ),
    Cause(
        id="unknown",
        depth=1000,
        explanation="Nothing in the log tells why.",
        signs=(),
        advice=(
            "Look at the exit status and at what the host did (`journalctl -k`, `docker inspect`).",
            "Run again with the log unbuffered and complete; send us the log if it is.",
        ),
        retry="not_as_is",
        source="",
    ),
    Cause(
        id="success",
        depth=2000,
        explanation="The program ended well; the errors in its log were handled.",
        signs=(),
        advice=(),
        retry="not_as_is",
        source="",
    ),
)
