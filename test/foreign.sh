#!/usr/bin/env bash
# foreign.sh ARCH COMMAND…: runs the command where programs of that architecture run, too, by QEMU's
# emulation of one program (Debian's package qemu-user-static). The machine itself is not taught to:
# binfmt_misc belongs to a user namespace since Linux 6.7, and to the machine before. Where it was
# taught by someone, nothing is done.
# In the namespace, whose users are the machine's, no device can be made.
set -euo pipefail
arch=$1; shift
case $arch in
  amd64) qemu=x86_64 ;;
  arm64) qemu=aarch64 ;;
  *) qemu=$arch ;;
esac
[[ ! -e /proc/sys/fs/binfmt_misc/qemu-$qemu ]] || exec "$@"

handler=/usr/lib/binfmt.d/qemu-$qemu.conf
if [[ ! -e $handler ]]; then
  echo "foreign: install qemu-user-static, which runs programs of $arch" >&2; exit 1
fi
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
mkfifo "$dir/up" "$dir/down"
# The shell that waits has no rights there yet. What it becomes has them, when users are mapped.
unshare --user --mount --pid --fork --kill-child sh -euc '
  echo >"$1/up"; read -r line <"$1/down"; shift
  exec "$@"' sh "$dir" sh -euc '
  mount -t proc proc /proc
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc || {
    echo "foreign: this needs Linux 6.7, or binfmt-support installed before qemu-user-static" >&2
    exit 1
  }
  cat "$1" >/proc/sys/fs/binfmt_misc/register
  shift
  exec "$@"' sh "$handler" env container=lxc "$@" & # debootstrap asks for no devices in one
child=$!
exec 3<>"$dir/up" # so that it is not waited for by opening it
read -rt 10 _ <&3 || { echo "foreign: no user namespace is to be had here" >&2; exit 1; }
echo 0 0 4294967295 >"/proc/$child/gid_map"
echo 0 0 4294967295 >"/proc/$child/uid_map"
echo >"$dir/down"
wait "$child"
