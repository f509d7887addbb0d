# Stands for a fresh TPU VM: systemd, sshd, sudo, the distribution's own Python, and a Docker engine of
# its own. For tests on one machine only: see tests/stand_in_vms.py, which builds and starts it.
# A libpython in /usr/local/lib stays: the test's conda package of CPython is not relinked to find its own.
ARG BASE
FROM ${BASE}
RUN export DEBIAN_FRONTEND=noninteractive && \
    apt-get update -q && \
    apt-get install -y -q --no-install-recommends \
        systemd systemd-sysv dbus openssh-server sudo python3 git docker.io iptables && \
    rm -rf /var/lib/apt/lists/* && \
    rm -rf /usr/local/lib/python3.12 /usr/local/bin/* && \
    rm -f /etc/ssh/ssh_host_* && \
    printf 'PasswordAuthentication no\nHostKey /etc/ssh/host_key\n' >/etc/ssh/sshd_config.d/stand-in.conf && \
    useradd --create-home --shell /bin/bash person && \
    echo 'person ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/person && \
    systemctl enable ssh docker
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
