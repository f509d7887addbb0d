"""The whole table of causes, and the one cheap search for its words."""

from collections.abc import Mapping

from runner import causes_end, causes_machine, causes_memory, causes_program, causes_tpu
from runner.cause import Cause, key_words

CAUSES: tuple[Cause, ...] = (
    *causes_memory.CAUSES,
    *causes_tpu.CAUSES,
    *causes_program.CAUSES,
    *causes_machine.CAUSES,
    *causes_end.CAUSES,
)
BY_ID: Mapping[str, Cause] = {cause.id: cause for cause in CAUSES}

_PATTERNS = tuple(sign.pattern for cause in CAUSES for sign in cause.signs)
# Besides the causes' own: tracebacks, exit statuses, and what the engine says of its KV pool.
_OWN = (
    *("Traceback", "Error: ", "Exception: ", "exit_status", "exit=", "ExitCode", "exited with"),
    *("exit code", "max_total_num_tokens", "remaining number of requests", "token usage"),
    *("Prefill batch", "Decode batch", "CpuDevice(", "TFRT_CPU", "CudaDevice", "Exception ignored"),
    *("During handling of", "The above exception", "could not determine TPU"),
)
KEY_WORDS = frozenset(
    (
        *(word for pattern in _PATTERNS for word in key_words(pattern)),
        *(max(phrase.split(), key=len) for phrase in _OWN),
    )
)
KEY_PHRASES = frozenset(
    (
        *(phrase for pattern in _PATTERNS for phrase in key_words(pattern, phrases=True)),
        *(phrase.strip() for phrase in _OWN),
    )
)
