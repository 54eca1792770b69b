#!/bin/sh
# Makes what others' packages add to the root filesystem of a box: programs.sh BASE PACKAGES DIR.
# BASE is of rootfs.sh and stays as it is; DIR becomes the upper folder of an overlay over it. What
# the packages bring starts when a test starts it. test/kept.sh runs it, and keeps what it made.
set -eu
base=$1 packages=$2 new=$3
mkdir "$new" "$new.work" "$new.root"
trap 'rm -rf "$new.work" "$new.root"' EXIT
unshare --mount sh -eu -c '
	mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$2.work" "$2.root"
	cp /etc/resolv.conf "$2.root/etc/"
	exec chroot "$2.root" sh -eu -c "$0" "$3"' '
	release=$(. /etc/os-release; echo "$VERSION_CODENAME")
	list=/etc/apt/sources.list.d/programs.list
	echo "deb http://deb.debian.org/debian $release main" >$list
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $0
	apt-get clean
	rm -rf $list /var/lib/apt/lists/* /etc/resolv.conf
	for unit in containerd docker.socket docker fail2ban firewalld nftables ufw; do
		systemctl -q disable $unit 2>/dev/null || true # where its package is
	done' "$base" "$new" "$packages" >"$new.log" 2>&1 || { tail -5 "$new.log" >&2; exit 1; }
rm "$new.log"
