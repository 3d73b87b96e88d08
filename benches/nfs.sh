#!/usr/bin/env bash
# Several hosts and two users on one cache on real NFS, also where this kernel has none: a virtual machine with
# Debian's kernel serves a folder to itself on loopback, twice mounted without a shared cache, so that each
# mount is another client. Runs benches/network.py there, kills of benches/kill_storm.py, and `pipe doctor`.
# Exit code 1 where one of them failed or did not come to its end, 77 where there is no virtual machine to be had.
#   bash benches/nfs.sh PIPE [SECONDS [PROCESSES [KILLS]]]
# Needs root, /dev/kvm, 4 GiB of disk; installs qemu-system-x86 and mmdebstrap where they are missing.
set -euo pipefail
pipe="$(realpath "$1")" seconds="${2:-120}" processes="${3:-8}" kills="${4:-300}"
if [ "$(id -u)" != 0 ] || [ ! -w /dev/kvm ]; then
  echo 'needs root and /dev/kvm' >&2
  exit 77
fi
here="$(cd "$(dirname "$0")" && pwd)"
work="${PIPE_VM:-$(mktemp -d -t pipe-nfs-XXXX)}"
mkdir -p "$work"
for program in qemu-system-x86_64 mmdebstrap; do
  command -v "$program" >/dev/null && continue
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends qemu-system-x86 seabios mmdebstrap >/dev/null
done
root="$work/root"
if [ ! -d "$root/boot" ]; then
  mmdebstrap --quiet --variant=minbase \
    --include=linux-image-amd64,nfs-kernel-server,nfs-common,python3,util-linux,hostname,kmod,iproute2,procps \
    bookworm "$root"
fi
mkdir -p "$root/trial"
cp "$pipe" "$root/trial/pipe"
cp "$here"/*.py "$root/trial/"
cat >"$root/trial/init" <<INIT
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
mount -t devtmpfs dev /dev 2>/dev/null; mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm
ip link set lo up; hostname server
mkdir -p /srv/shared /mnt/one /mnt/two /run/rpcbind /var/lib/nfs/v4recovery /proc/fs/nfsd
mkdir -p /srv/shared; chmod 755 /srv/shared
modprobe nfsd; mount -t nfsd nfsd /proc/fs/nfsd
echo '/srv/shared 127.0.0.1(rw,sync,no_root_squash,no_subtree_check,fsid=0)' >/etc/exports
rpcbind; rpc.statd 2>/dev/null; exportfs -ar; rpc.nfsd 8; rpc.mountd
for version in "vers=4.2" "vers=3"; do
  root=/; [ "\$version" = vers=3 ] && root=/srv/shared
  rm -rf /srv/shared/*
  for mount in one two; do mount -t nfs -o "\$version,nosharecache,proto=tcp" "127.0.0.1:\$root" "/mnt/\$mount" || echo "no mount"; done
  echo "== \$version on \$(uname -r)"; grep /mnt/one /proc/mounts
  cd /trial
  python3 network.py /trial/pipe $seconds $processes /mnt/one /mnt/two; echo "exit \$?"
  mkdir -p /mnt/one/storm
  TMPDIR=/mnt/one/storm python3 kill_storm.py /trial/pipe $kills; echo "exit \$?"
  /trial/pipe doctor -f /trial/none.yaml --cache /mnt/one/cache 2>&1 | head -20
  umount /mnt/one /mnt/two
done
echo "== over"; sync; echo o >/proc/sysrq-trigger; sleep 5
INIT
chmod +x "$root/trial/init"
image="$work/disk.img"
rm -f "$image"
mke2fs -q -t ext4 -d "$root" "$image" 6G
status=0
timeout 3000 qemu-system-x86_64 -enable-kvm -cpu host,arch-capabilities=off -smp 2 -m 3G -display none -serial stdio -no-reboot -nic none \
  -kernel "$(ls "$root"/boot/vmlinuz-* | tail -1)" -initrd "$(ls "$root"/boot/initrd.img-* | tail -1)" \
  -drive "file=$image,if=virtio,format=raw,cache=unsafe" \
  -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/trial/init" | tee "$work/console" || status=$?
# The machine's own exit code says nothing: what ran inside wrote its own.
ended="$(tr -d '\r' <"$work/console" | { grep -E '^(exit [0-9]+|no mount|== over)$' || true; } |
  LC_ALL=C sort | uniq -c | tr -s ' \n' ' ')"
[ -n "${PIPE_VM:-}" ] || rm -rf "$work"
if [ "$ended" != ' 1 == over 4 exit 0 ' ]; then
  echo "failed: of four trials and the end of the machine (exit code $status), these were seen:$ended" >&2
  exit 1
fi
