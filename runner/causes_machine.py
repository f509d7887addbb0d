"""The table of causes, fourth part: containers, hosts, the cloud, the network, and how it ended."""

from runner.cause import Cause, Sign

CAUSES = (
    Cause(
        id="cloud_capacity",
        depth=620,
        explanation="The cloud has no such machine to give: quota, or no capacity in the zone.",
        signs=(
            Sign(r"[Nn]o more capacity in the zone|ZONE_RESOURCE_POOL_EXHAUSTED"),
            Sign(
                r"Quota limit '?\S+'? has been exceeded|[Qq]uota exceeded for quota|QUOTA_EXCEEDED"
            ),
            Sign(r"[Qq]uota '\S+' exceeded|[Ii]nsufficient .{0,30}quota|exceeded (?:your )?quota"),
            Sign(r"does not have (?:enough|sufficient) (?:resources|capacity)|[Ss]tock-?out\b"),
            Sign(r"[Ii]nsufficient (?:capacity|resources)|reached a limit on the number of"),
            Sign(r"\(gcloud[\w.-]*\) .{0,40}RESOURCE_EXHAUSTED"),
        ),
        advice=(
            "Another zone, a queued resource (`gcloud compute tpus queued-resources create`), or"
            " spot capacity.",
            "Quota: ask for more on the project's quota page; the line names the quota.",
            "`no more capacity` has also been seen with missing application-default credentials.",
        ),
        retry="retryable",
        source="own runs with gcloud",
    ),
    Cause(
        id="gcloud_auth",
        depth=630,
        explanation="Google Cloud does not know who asks: no credentials, or expired ones.",
        signs=(
            Sign(r"\bUNAUTHENTICATED\b|[Ii]nvalid authentication credentials"),
            Sign(r"do not currently have an active account selected"),
            Sign(r"[Rr]eauthentication (?:failed|required|is needed)"),
            Sign(r"problem refreshing your current auth tokens|invalid_grant"),
            Sign(
                r"default credentials were not found|[Cc]ould not automatically determine credent"
            ),
            Sign(r"DefaultCredentialsError|google\.auth\.exceptions\.RefreshError"),
            Sign(r"Please run:? .{0,10}gcloud auth (?:application-default )?login", sure=False),
        ),
        advice=("`gcloud auth login`, or a service account's key or impersonation on this host.",),
        retry="after_clean_up",
        source="own runs with gcloud",
    ),
    Cause(
        id="gcloud_permission",
        depth=631,
        explanation="The account is known, and may not do this.",
        signs=(
            Sign(
                r"\(gcloud[\w.-]*\) .{0,60}(?:PERMISSION_DENIED|code=403|does not have permission)"
            ),
            Sign(r"PERMISSION_DENIED: |[Rr]equired '[\w.]+' permission|Permission '[\w.]+' denied"),
            Sign(r"does not have (?:[\w.]+ access|permission|storage\.\w+)|IAM_PERMISSION_DENIED"),
            Sign(r"insufficient authentication scopes|ACCESS_TOKEN_SCOPE_INSUFFICIENT"),
            Sign(r"API has not been used in project|SERVICE_DISABLED"),
        ),
        advice=("Ask for the role that holds the permission in the line, on that project.",),
        retry="not_as_is",
        source="own runs with gcloud",
    ),
    Cause(
        id="tpu_vm_not_found",
        depth=632,
        explanation="There is no TPU VM of that name in that zone (any more).",
        signs=(
            Sign(r"NOT_FOUND: Resource '\S+' was not found"),
            Sign(
                r"[Rr]esource '?projects/\S+/(?:nodes|instances|queuedResources)/\S+ was not found"
            ),
            Sign(r"\(gcloud[\w.-]*\) .{0,80}(?:NOT_FOUND|not found|code=404)"),
            Sign(r"(?:TPU|[Nn]ode|[Ii]nstance) \S+ (?:was )?not found in (?:zone|location)"),
        ),
        advice=(
            "`gcloud compute tpus tpu-vm list --zone ZONE`; a preempted VM may have been deleted.",
        ),
        retry="not_as_is",
        source="own runs with gcloud",
    ),
    Cause(
        id="docker_daemon_down",
        depth=650,
        explanation="No Docker daemon answers.",
        signs=(
            Sign(r"[Cc]annot connect to the Docker daemon|[Ii]s the docker daemon running"),
            Sign(r"[Ff]ailed to connect to the docker API|docker\.sock.{0,40}no such file"),
            Sign(
                r"Error while fetching server API version.{0,200}(?:No such file"
                r"|FileNotFound|refused"
                r"|Connection aborted)(?!.{0,80}[Pp]ermission)"
            ),
            Sign(r"docker(?:d|\.service).{0,60}(?:failed to start|is not running|inactive)"),
        ),
        advice=(
            "`sudo systemctl start docker`, or another place: `headroom run --where process`.",
        ),
        retry="after_clean_up",
        source="own runs with docker",
    ),
    Cause(
        id="docker_permission",
        depth=645,
        explanation="The user may not talk to the Docker daemon.",
        signs=(
            Sign(r"permission denied while trying to connect to the (?:Docker|docker)"),
            Sign(r"docker\.sock.{0,80}[Pp]ermission denied"),
            Sign(r"(?:server API version|DockerException).{0,120}[Pp]ermission ?[Dd]enied"),
            Sign(r"[Pp]ermission denied.{0,80}docker\.sock"),
        ),
        advice=("Add the user to the group docker and log in again, or use sudo.",),
        retry="after_clean_up",
        source="own runs with docker",
    ),
    Cause(
        id="docker_device_missing",
        depth=640,
        explanation="The container asks for a device that this host does not have.",
        signs=(
            Sign(r"error gathering device information while adding custom device"),
            Sign(
                r"could not select device driver|no such device.{0,40}/dev/"
                r"|unknown or invalid runtime"
            ),
        ),
        advice=(
            "v4 has /dev/accel0 to 3; v5e and v6e have /dev/vfio/*: `ls /dev/accel* /dev/vfio`.",
            "Without a TPU, name none in the job.",
        ),
        retry="not_as_is",
        source="own runs with docker (exit status 127, not 125)",
    ),
    Cause(
        id="docker_image_missing",
        depth=652,
        explanation="The image exists neither here nor in its registry, or the registry hides it.",
        signs=(
            Sign(r"No such image|[Ii]mage \S+ not found(?: locally)?$|ImageNotFound"),
            Sign(r"manifest (?:for \S+ )?(?:unknown|not found)|pull access denied"),
            Sign(r"repository does not exist|failed to resolve reference .{0,200}not found"),
            Sign(
                r"failed to resolve source metadata .{0,200}not found|ErrImagePull|ImagePullBackOff"
            ),
        ),
        advice=(
            "Build or load it (`make image`), or correct its name and tag in the job.",
            "A private registry says `not found` without `docker login`.",
        ),
        retry="after_clean_up",
        source="own runs with docker",
        exit_code=True,
    ),
    Cause(
        id="docker_name_conflict",
        depth=651,
        explanation="A container of that name exists already.",
        signs=(
            Sign(
                r"[Tt]he container name \S+ is already in use|container name .{0,80}already in use"
            ),
        ),
        advice=("Remove the old one if it has ended (`docker rm NAME`); if it runs, it is a job.",),
        retry="after_clean_up",
        source="own runs with docker",
    ),
    Cause(
        id="docker_registry_network",
        depth=653,
        explanation="The image's registry cannot be reached.",
        signs=(
            Sign(r"Error response from daemon: (?:Get|Head) \"?https?://\S+.{0,200}"),
            Sign(
                r"(?:Get|Head) \\?\"?https?://\S+/v2/\S*.{0,120}(?:no such host|dial"
                r"|timeout|refused"
                r"|TLS|EOF|context)"
            ),
            Sign(
                r"failed to (?:do request|resolve source metadata|copy|pull|fetch).{0,300}"
                r"(?:dial tcp|i/o timeout|no such host|TLS handshake|deadline exceeded)"
            ),
            Sign(r"registry-1\.docker\.io.{0,200}(?:timeout|no such host|refused|exceeded)"),
            Sign(r"toomanyrequests: |pull rate limit"),
        ),
        advice=(
            "Check the daemon's DNS, proxy and firewall (not only the shell's).",
            "Or bring the image as a file: `docker save` there, `docker load` here.",
        ),
        retry="retryable",
        source="own runs with docker",
        exit_code=True,
    ),
    Cause(
        id="docker_build_failed",
        depth=780,
        explanation="A step of the Dockerfile failed.",
        signs=(
            Sign(r"returned a non-zero code: \d+"),
            Sign(r"failed to solve: |did not complete successfully: exit code: \d+"),
            Sign(r"failed to (?:build|compute cache key|read dockerfile)|dockerfile parse error"),
            Sign(r"(?:COPY|ADD) failed: |executor failed running"),
        ),
        because=("pip_resolution", "network_unreachable", "disk_full", "docker_registry_network"),
        advice=("The lines above the message are that step's own output; run it by hand there.",),
        retry="not_as_is",
        source="own runs with docker",
    ),
    Cause(
        id="pip_resolution",
        depth=660,
        explanation="pip found no set of versions that fits together, or no such version at all.",
        signs=(
            Sign(r"Cannot install .{0,300} because these package versions have conflicting"),
            Sign(r"ResolutionImpossible"),
            Sign(r"[Nn]o matching distribution found|Could not find a version that satisfies"),
            Sign(r"No solution found when resolving dependencies|requirements are unsatisfiable"),
            Sign(r"requires a different Python|Requires-Python", sure=False),
            Sign(r"LibMambaUnsatisfiableError|UnsatisfiableError|PackagesNotFoundError"),
            Sign(r"THESE PACKAGES DO NOT MATCH THE HASHES|Hashes are required in --require-hashes"),
        ),
        advice=(
            "Install from the lock; loosen the pin that the message names.",
            "A wheel may not exist for this Python or platform: `pip download` shows.",
        ),
        because=("network_unreachable", "disk_full"),
        retry="not_as_is",
        source="own runs with pip",
    ),
    Cause(
        id="ssh_hostkey",
        depth=700,
        explanation="The host's key is unknown, or is not the one known for that address.",
        signs=(
            Sign(r"FATAL ERROR: .{0,80}host key.*|FATAL ERROR: Host key .*"),
            Sign(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED"),
            Sign(r"host key is not cached|host key does not match|Host key for \S+ has changed"),
            Sign(r"BadHostKeyException|not found in known_hosts|POTENTIAL SECURITY BREACH"),
        ),
        advice=(
            "A new VM on an old address: remove the old key (`ssh-keygen -R HOST`), fetch the new"
            " one and compare it with the VM's console.",
        ),
        retry="after_clean_up",
        source="own runs with OpenSSH and PuTTY",
    ),
    Cause(
        id="ssh_auth",
        depth=710,
        explanation="The host answers and refuses the key or user.",
        signs=(
            Sign(r"Permission denied \([\w,-]*(?:publickey|password|keyboard|gssapi)"),
            Sign(r"No supported authentication methods available|Too many authentication failures"),
            Sign(r"UNPROTECTED PRIVATE KEY FILE|Load key \S+ (?:bad permissions|invalid format)"),
            Sign(r"paramiko\S*AuthenticationException|[Aa]uthentication failed\.?$", sure=False),
            Sign(r"Permission denied, please try again|Access denied$|Invalid/incorrect password"),
            Sign(r"sign_and_send_pubkey: |no mutual signature algorithm"),
        ),
        advice=(
            "The right user and key (`ssh -v`); with OS Login the user is the account's name.",
            "The private key must be readable by its owner only (chmod 600).",
        ),
        retry="after_clean_up",
        source="own runs with OpenSSH and PuTTY",
    ),
    Cause(
        id="ssh_timeout",
        depth=730,
        explanation="The host does not answer on the ssh port.",
        signs=(
            Sign(
                r"connect to (?:host|address) \S+(?: port \d+)?: (?:Connection|Operation) timed out"
            ),
            Sign(
                r"Connection timed out during banner exchange"
                r"|Timed? ?out (?:while )?waiting for .{0,20}ssh"
            ),
            Sign(
                r"FATAL ERROR: (?:Network error: )?Connection timed out"
                r"|Error reading SSH protocol ban"
            ),
            Sign(
                r"[Ss][Ss][Hh].{0,80}(?:timed out|timeout)|timed out waiting for .{0,20}SSH",
                sure=False,
            ),
        ),
        advice=("Firewall rule for port 22 (or IAP), the external address, the VM's state.",),
        retry="retryable",
        source="OpenSSH, PuTTY",
    ),
    Cause(
        id="ssh_unreachable",
        depth=735,
        explanation="There is no way to the host's ssh port: name unknown, port closed, no route.",
        signs=(
            Sign(r"ssh: Could not resolve hostname"),
            Sign(r"ssh: connect to host \S+ port \d+: "),
            Sign(
                r"connect to (?:host|address) \S+(?: port \d+): (?:Connection refused"
                r"|No route|Network)"
            ),
            Sign(r"FATAL ERROR: Network error: (?:Connection refused|No route|Network is|Host)"),
            Sign(r"NoValidConnectionsError|Unable to open connection|Host does not exist"),
        ),
        advice=("Is the VM running, and is that its present address? A restart changes it.",),
        retry="retryable",
        source="own runs with OpenSSH and PuTTY",
    ),
    Cause(
        id="ssh_dropped",
        depth=740,
        explanation="The ssh connection broke while the command ran; the job may still be running.",
        signs=(
            Sign(r"Connection to \S+(?: port \d+)? closed by remote host"),
            Sign(
                r"client_loop: send disconnect|packet_write_(?:wait|poll)"
                r"|[Cc]onnection .{0,60}Broken pipe"
            ),
            Sign(r"Timeout, server \S+ not responding|kex_exchange_identification: "),
            Sign(r"(?:Connection (?:closed|reset) by|Connection reset) \S*.{0,40}port \d+"),
            Sign(r"mux_client\w*: .{0,40}(?:Broken pipe|failed)|ssh_exchange_identification: "),
            Sign(
                r"[Rr]emote side unexpectedly closed|Server unexpectedly closed network connection"
            ),
            Sign(
                r"FATAL ERROR: (?:Network error: )?(?:Software caused|Connection reset"
                r"|.{0,20}closed)"
            ),
        ),
        advice=(
            "Look before you start again: `headroom status`; a job started with nohup, in a"
            " container or under systemd goes on.",
            "Start jobs so that they outlive the connection, and set ServerAliveInterval.",
        ),
        retry="after_clean_up",
        source="own runs with OpenSSH",
        exit_code=True,
    ),
    Cause(
        id="connection_refused",
        depth=785,
        explanation="Nothing listens at that address: the server has not started, or has ended.",
        signs=(
            Sign(r"curl: \(7\)|[Cc]ould ?n[o']t connect to server"),
            Sign(r"[Cc]onnection refused|ConnectionRefusedError|ECONNREFUSED|\[Errno 111\]"),
            Sign(r"Cannot connect to host \S+:\d+|All connection attempts failed", sure=False),
        ),
        advice=("Look at that server's own log; wait for its port before you ask.",),
        retry="retryable",
        source="own runs with curl",
    ),
    Cause(
        id="network_unreachable",
        depth=790,
        explanation="This host has no way out to that address: DNS, proxy, route or firewall.",
        signs=(
            Sign(r"[Tt]emporary failure (?:in name resolution|resolving)"),
            Sign(r"[Nn]etwork is unreachable|[Nn]o route to host|\[Errno 101\]|\[Errno 113\]"),
            Sign(
                r"[Nn]ame or service not known|[Cc]ould not resolve (?:host|proxy)"
                r"|NameResolutionError"
            ),
            Sign(
                r"[Nn]o such host|nodename nor servname|getaddrinfo failed|unable to resolve host"
            ),
            Sign(r"(?:ConnectTimeout|ReadTimeout)(?:Error)?\b|curl: \((?:6|28|35)\)", sure=False),
            Sign(r"dial tcp \S+ i/o timeout|[Ff]ailed to establish a new connection", sure=False),
        ),
        advice=("`getent hosts NAME`, then `curl -v`; proxies are set per program, not per host.",),
        retry="retryable",
        source="glibc and urllib3 wordings",
    ),
)
