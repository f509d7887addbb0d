"""The table of causes, third part: the program, its packages, its data and its services."""

from runner.cause import Cause, Sign

_HTTP_DETAILS = (
    r"Client error '(?P<http_status>\d{3})",
    r"HTTP Error (?P<http_status>\d{3})",
    r"\b(?P<http_status>[45]\d\d) (?:Client|Server) Error",
    r"status(?:_code| code)?[ :=]+(?P<http_status>[45]\d\d)\b",
)
_JAX_FAMILY = r"(?:jax|jaxlib|flax|optax|orbax|chex|torch_xla|numpy)"

CAUSES = (
    Cause(
        id="version_mismatch",
        depth=180,
        explanation="Two packages that must match do not: jax, jaxlib, libtpu, or one on top.",
        signs=(
            Sign(r"Mismatched PJRT plugin PJRT API version"),
            Sign(r"Unexpected PJRT_\w+ size: expected \d+, got \d+"),
            Sign(
                r"jaxlib (?:version )?(?:is version )?[\d.]+.{0,10} is newer than and incompatible"
            ),
            Sign(r"jaxlib is version [\d.]+\S*, but this version of jax requires"),
            Sign(r"module '" + _JAX_FAMILY + r"[\w.]*' has no attribute"),
            Sign(r"cannot import name '\w+' from '" + _JAX_FAMILY + r"[\w.]*'", sure=False),
            Sign(r"No module named '" + _JAX_FAMILY + r"\.[\w.]+'", sure=False),
            Sign(r"compiled using NumPy 1\.x cannot be run in|numpy\.dtype size changed"),
            Sign(
                r"built with a (?:later|newer|different|older) version|plugin is likely built with"
            ),
            Sign(r"libtpu version .{0,60}(?:incompatible|too old|mismatch|does not match)"),
            Sign(r"undefined symbol: \w+", sure=False),
            Sign(r"version `?'?GLIBC(?:XX)?_[\d.]+'? not found", sure=False),
            Sign(r"but this version of \w+ requires|requires \w+ version [>=<]", sure=False),
            Sign(r"is incompatible with (?:the )?(?:installed )?(?:jax|jaxlib|libtpu)\b"),
        ),
        details=(
            r"PJRT plugin PJRT API version \(?(?P<plugin_api>\d+\.\d+)",
            r"framework PJRT API version \(?(?P<framework_api>\d+\.\d+)",
            r"plugin is built with PJRT API version (?P<plugin_api>\d+\.\d+)",
        ),
        advice=(
            "Install from the lock: jax, jaxlib and libtpu come as one set (`jax[tpu]`).",
            "Two packages that each bring a libtpu (torch_xla, jax) need one chosen by hand.",
            "`pip check`, and look for a second installation earlier on the path.",
        ),
        retry="after_clean_up",
        source="https://github.com/pytorch/xla/issues/6949;"
        " https://github.com/google-deepmind/weathernext/issues/185",
    ),
    Cause(
        id="shard_indivisible",
        depth=200,
        explanation="A size does not divide evenly over the devices (or steps) it is split over.",
        signs=(
            Sign(r"should be divisible by \d+, but it is equal to \d+"),
            Sign(r"must be (?:evenly )?(?:divisible by|a multiple of)"),
            Sign(r"(?:is|are) not (?:evenly )?(?:divisible by|a multiple of)|not evenly divide"),
            Sign(r"is partitioned \d+ times, but the dimension size is \d+"),
            Sign(r"(?:[Uu]nable to|[Cc]annot|[Cc]an't|[Cc]ould not) shard\b"),
            Sign(r"does not (?:evenly )?divide\b|must divide (?:evenly )?"),
            Sign(r"[Nn]ot divisible by|[Ii]ndivisible"),
        ),
        details=(
            r"(?:batch|batch[_ ]?size)[\s=:(]*(?P<batch>\d+)",
            r"(?:divisible by|multiple of)[\s\w.]*?[\s=:(]+(?P<shards>\d+)",
            r"divisible by (?P<shards>\d+), but it is equal to (?P<size>\d+)",
            r"partitioned (?P<shards>\d+) times, but the dimension size is (?P<size>\d+)",
            r"(?P<shards>\d+) does not evenly divide (?P<size>\d+)",
        ),
        advice=(
            "Choose sizes that divide: sequences of a step by the devices that share them"
            " (mesh.dp x mesh.fsdp) and by train.micro_batch_size; heads and"
            " vocabulary by mesh.tp.",
            "Never pad silently: a padded batch changes the gradient.",
        ),
        retry="not_as_is",
        source="jax/_src/pjit.py, sharding checks",
    ),
    Cause(
        id="disk_full",
        depth=170,
        explanation="A file system is full (the disk, or /dev/shm, which is 64 MB in a container).",
        signs=(
            Sign(r"[Nn]o space left on device|ENOSPC|\[Errno 28\]|os error 28\b"),
            Sign(r"Not enough free (?:disk )?space|[Nn]ot enough disk space"),
            Sign(r"[Dd]isk quota exceeded|\[Errno 122\]"),
            Sign(r"No usable temporary directory"),
        ),
        details=(
            r"free space to write (?P<requested_bytes>\d+(?: bytes)?)\b",
            r"need(?:s|ed)? (?P<requested_bytes>\d+) bytes",
        ),
        advice=(
            "`df -h` and `df -i` on the path of the message; old images (`docker system df`), model"
            " caches and checkpoints are the usual owners.",
            "If the path is /dev/shm: give the container a larger one (--shm-size) or the host's"
            " (--ipc host).",
        ),
        retry="after_clean_up",
        source="own runs",
    ),
    Cause(
        id="import_error",
        depth=240,
        explanation="A Python package or a shared library is missing in the environment.",
        signs=(
            Sign(r"package is not available in your environment"),
            Sign(r"^\W*(?:\S*ModuleNotFoundError|\S*ImportError): .*"),
            Sign(r"ModuleNotFoundError: |ImportError: |No module named [\w'.]+"),
            Sign(r"error while loading shared libraries"),
            Sign(r"\.so[\w.]*: cannot open shared object file"),
            Sign(r"(?:requires|need) .{0,60}(?:to be installed|but it was not found)", sure=False),
        ),
        advice=(
            "Install it from the lock, or use the image: `pip show NAME` in the very interpreter of"
            " the command line.",
            "A name that exists twice (a local file called like the package) also does this.",
        ),
        retry="after_clean_up",
        source="own runs",
        last=True,
    ),
    Cause(
        id="config_error",
        depth=260,
        explanation="The command line or a configuration file is wrong.",
        signs=(
            Sign(r"unrecognized arguments:|the following arguments are required|: invalid choice:"),
            Sign(
                r"^(?:\S+: )?[Ee]rror: (?:argument \S+:|No such (?:command|option)|Invalid value|"
                r"Missing (?:option|argument|parameter|command)|Got unexpected extra|"
                r"Option '?-)"
            ),
            Sign(r"YAML parsing failed|Syntax Error while loading YAML"),
            Sign(r"yaml\.(?:scanner|parser|constructor|composer|reader)\.\w+Error"),
            Sign(
                r"omegaconf\.errors\.\w+|hydra\.errors\.\w+|ConfigAttributeError|Could not override"
            ),
            Sign(r"pydantic\S*ValidationError|\d+ validation errors? for"),
            Sign(r"No such file or directory: \S*\.(?:ya?ml|toml|ini|cfg|conf|env|gin|json5?)\b"),
            Sign(
                r"(?:is )?an? (?:unknown|invalid|unrecognized|unexpected) (?:key"
                r"|option|setting|field)\b"
            ),
            Sign(
                r"[Uu]nknown (?:key|command line flag|flags? in XLA_FLAGS|backend:?"
                r"|option|argument)"
            ),
            Sign(r"Backend '(?!tpu')\w+' is not in the list of known backends"),
            Sign(r"tomllib\.TOMLDecodeError|configparser\.\w+Error|toml\S*DecodeError"),
            Sign(
                r"exists in these Python versions|: command not found|executable file not found in"
            ),
            Sign(r"got an unexpected keyword argument '--|invalid reference format|unknown flag: "),
            Sign(r"conflicting action statements|couldn't resolve module/action"),
            Sign(r"ERROR! the (?:role|playbook).{0,80}(?:not found|could not be found)"),
            Sign(
                r"[Cc]ould not match supplied host pattern|Specified (?:hosts|inventory).{0,40}not"
            ),
            Sign(r"unbound variable$|syntax error near unexpected token"),
            Sign(r"(?:template error|AnsibleUndefinedVariable|'\S+' is undefined)", sure=False),
            Sign(r"\(gcloud[\w.-]*\) (?:Invalid choice|argument |INVALID_ARGUMENT|unrecognized)"),
            Sign(r"environment variable \S+ (?:is not set|must be set|not set)", sure=False),
            Sign(r"is undefined\. .{0,60}is undefined|Missing sudo password", sure=False),
        ),
        advice=(
            "Correct the key, option or path that the line names; `headroom plan` checks a job"
            " without running it.",
        ),
        retry="not_as_is",
        source="own runs with argparse, click, OmegaConf, gcloud and Ansible",
    ),
    Cause(
        id="hf_rate_limit",
        depth=300,
        explanation="The model hub answered 429: too many requests. The network is fine, although"
        " the last line says otherwise.",
        signs=(
            Sign(r"HTTP Error 429|429 Client Error|Client error '429|429 Too Many Requests"),
            Sign(r"[Tt]oo [Mm]any [Rr]equests .{0,80}(?:huggingface|hf\.co|/resolve/|/api/models)"),
            Sign(r"(?:huggingface|hf\.co)\S*.{0,200}(?:[Tt]oo [Mm]any [Rr]equests|rate limit)"),
            Sign(r"We had to rate limit you|rate limit.{0,60}hugging ?face"),
        ),
        details=_HTTP_DETAILS,
        advice=(
            "Wait some minutes and try again, with a token: HF_TOKEN has higher limits.",
            "Download the model once to a shared cache, and start the workers from it with"
            " HF_HUB_OFFLINE=1.",
        ),
        retry="retryable",
        source="own runs with huggingface_hub",
    ),
    Cause(
        id="hf_repo_not_found",
        depth=310,
        explanation="The hub has no such repository, revision or file (it says 401 for a missing"
        " one), or a local path was meant and does not exist.",
        signs=(
            Sign(r"\b(?:RepositoryNotFound|RevisionNotFound|(?:Remote)?EntryNotFound)Error: ?.*"),
            Sign(r"(?:Repository|Revision|Entry) Not Found for url"),
            Sign(r"HFValidationError: |Repo id must (?:be in the form|use alphanumeric)"),
            Sign(r"is not a (?:local folder|valid model identifier)"),
            Sign(r"Incorrect path_or_model_id|does not appear to have (?:a file|files) named"),
            Sign(
                r"404 (?:Client Error|Not Found).{0,60}(?:huggingface|hf\.co|/resolve/|/api/models)"
            ),
            Sign(
                r"is not a valid git identifier|Couldn't find (?:a |any )?dataset"
                r"|DatasetNotFoundError"
            ),
        ),
        details=_HTTP_DETAILS,
        advice=(
            "Check the spelling of model and revision; a local path must exist on this host, in"
            " this container.",
            "A private repository looks missing without a token: set HF_TOKEN.",
        ),
        retry="not_as_is",
        source="own runs with huggingface_hub",
    ),
    Cause(
        id="hf_auth",
        depth=320,
        explanation="The hub refuses: no token, a wrong one, or the licence of a gated model is not"
        " accepted.",
        signs=(
            Sign(
                r"GatedRepoError: ?.*|Cannot access gated repo"
                r"|You are trying to access a gated repo"
            ),
            Sign(r"in the authorized list|[Aa]ccess to (?:model|dataset) \S+ is restricted"),
            Sign(r"(?:Client error '|HTTP Error )40[13]|40[13] Client Error", sure=False),
            Sign(r"Invalid (?:user token|username or password|credentials in Authorization)"),
            Sign(r"LocalTokenNotFoundError|[Tt]oken is required .{0,60}but no token found"),
            Sign(r"Your token.{0,40}(?:invalid|expired)|User Access Token .{0,40}expired"),
        ),
        details=_HTTP_DETAILS,
        advice=(
            "Pass HF_TOKEN by name into the container (container.pass_env: [HF_TOKEN]).",
            "Accept the model's licence on its page, with the account of that token.",
        ),
        retry="not_as_is",
        source="own runs with huggingface_hub",
    ),
    Cause(
        id="hf_offline",
        depth=330,
        explanation="The hub cannot be reached, and the files are not in the local cache.",
        signs=(
            Sign(r"couldn't connect to '?https?://\S+ to load"),
            Sign(r"Couldn't reach .{1,160}(?:on the Hub|huggingface)"),
            Sign(r"We couldn't connect to|LocalEntryNotFoundError: ?.*"),
            Sign(
                r"OfflineModeIsEnabled|[Oo]ffline mode is enabled"
                r"|outgoing traffic has been disabled"
            ),
            Sign(r"cannot find the requested files in the (?:disk|local) cache"),
            Sign(r"host='(?:\S+\.)?(?:huggingface\.co|hf\.co)', port"),
            Sign(
                r"Error while (?:downloading"
                r"|retrieving) (?:from )?https?://\S*(?:huggingface|hf\.co)"
            ),
            Sign(
                r"(?:huggingface\.co|hf\.co)\S*.{0,160}(?:Name or service not known|timed out|"
                r"Connection refused|Temporary failure in name resolution)"
            ),
        ),
        because=("hf_rate_limit",),
        advice=(
            "Check the host's way out: DNS, proxy, firewall; in a container also its network.",
            "Or bring the model: download it elsewhere, name the local path, HF_HUB_OFFLINE=1.",
        ),
        retry="retryable",
        source="own runs with huggingface_hub and transformers",
    ),
    Cause(
        id="wandb_auth",
        depth=350,
        explanation="Weights & Biases refuses the key: missing, wrong length, stray white space, or"
        " not allowed in that entity.",
        signs=(
            Sign(
                r"API key (?:cannot start|must (?:be|have)|contains|is (?:invalid|not)"
                r"|not configured)"
            ),
            Sign(
                r"WANDB_API_KEY invalid|wandb\S*(?:AuthenticationError|UsageError): .*(?:key|login)"
            ),
            Sign(r"No API key configured|api_key not configured|[Uu]se `?wandb login`? to log in"),
            Sign(
                r"wandb.{0,200}(?:\b40[13]\b|permission denied|[Uu]nauthorized"
                r"|user is not logged in)"
            ),
            Sign(r"wandb\S*AuthenticationError|is not logged in .{0,40}wandb"),
        ),
        advice=(
            "Put the key into WANDB_API_KEY instead of `wandb login`; a .env file with CRLF ends"
            " adds a stray carriage return.",
            "Old wandb (0.19) refuses new, longer keys: update it.",
            "Or run without: metrics.wandb: disabled.",
        ),
        retry="not_as_is",
        source="own runs with wandb 0.19 and 0.31",
    ),
    Cause(
        id="wandb_network",
        depth=360,
        explanation="Weights & Biases cannot be reached.",
        signs=(
            Sign(r"wandb\S*CommError: .*"),
            Sign(
                r"wandb: (?:ERROR|Network error).{0,200}(?:timed? ?out|no such host|[Cc]onnect"
                r"|unreachable|retry)"
            ),
            Sign(
                r"(?:api\.wandb\.ai|/graphql).{0,200}(?:no such host|timed out|refused|unreachable|"
                r"Max retries|resolve|resolution|deadline)"
            ),
            Sign(r"host='api\.wandb\.ai'"),
        ),
        advice=(
            "metrics.wandb: offline, and `wandb sync` later; the run's own records are complete"
            " without it.",
            "Check the host's way out: DNS, proxy, firewall.",
        ),
        retry="retryable",
        source="own runs with wandb 0.31",
        last=True,
    ),
    Cause(
        id="nan_loss",
        depth=480,
        explanation="The loss became NaN: the run goes on, and learns nothing.",
        signs=(
            Sign(r"loss['\"]?\s*[=:]\s*-?(?:nan|NaN)\b"),
            Sign(r"FloatingPointError: invalid value \(nan\)"),
            Sign(
                r"[Ll]oss (?:is|became|was|turned) (?:-?inf or )?(?:nan|NaN"
                r"|non-?finite|not finite)\b"
            ),
            Sign(r"NaN(?: or [Ii]nf)? (?:loss|gradients?|grad_norm|values?)\b"),
            Sign(r"[Nn]on-?finite (?:loss|gradients?|grad_norm|values? in)\b"),
            Sign(r"\bgrad_norm['\"]?\s*[=:]\s*-?(?:nan|NaN)\b", sure=False),
            Sign(r"(?:loss contains|gradients? contains?|gradients have) (?:nan|NaN|Inf)"),
        ),
        advice=(
            "Look at the steps before: a growing grad_norm asks for a smaller learning rate,"
            " warm-up or max_grad_norm; a sudden NaN asks for the data or a mask that hides all.",
            "jax_debug_nans is no proof: it misses a NaN on a later call of a jitted function"
            " (jax 0.8.2). Check the loss itself.",
            "Go back to the last checkpoint with a finite loss.",
        ),
        retry="not_as_is",
        source="own runs with jax 0.8.2",
    ),
)
