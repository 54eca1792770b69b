#!/bin/sh
# Makes the root filesystem of a box: rootfs.sh RELEASE ARCH DIR. Debian's minimal base with systemd,
# *without* iptables and ca-certificates, as a minimal image may be; a file: repository in it holds
# both, for bootstrap to install, and rsyslog, which Compute Engine's images have. test/kept.sh runs it,
# and keeps what it made.
set -eu
release=$1 arch=$2 new=$3
mkdir "$new"
if [ "${container:-}" = lxc ]; then # test/foreign.sh: no device can be made, those of here are lent
	mkdir "$new/dev"
	for device in null zero full random urandom tty; do
		touch "$new/dev/$device"
		mount --bind "/dev/$device" "$new/dev/$device"
	done
fi
debootstrap --arch="$arch" --variant=minbase --include=systemd,systemd-sysv,dbus,iproute2,curl,netcat-openbsd "$release" "$new" >"$new.log" 2>&1 ||
	{ tail -5 "$new.log" >&2; exit 1; }
rm "$new.log"

# The packages that bootstrap shall install, with what they depend on.
repo=$new/var/local/repo
mkdir -p "$repo"
chroot "$new" apt-get -qq update
chroot "$new" apt-get clean # of what debootstrap has installed
chroot "$new" apt-get -qq -y --no-install-recommends --download-only install iptables ca-certificates rsyslog >/dev/null
mv "$new"/var/cache/apt/archives/*.deb "$repo/"
for deb in "$repo"/*.deb; do
	dpkg-deb -f "$deb"
	printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$(basename "$deb")" "$(stat -c %s "$deb")" "$(sha256sum "$deb" | cut -d' ' -f1)"
done >"$repo/Packages"
rm -rf "$new"/etc/apt/sources.list "$new"/etc/apt/sources.list.d/* "$new"/var/lib/apt/lists/*
echo 'deb [trusted=yes] file:/var/local/repo ./' >"$new/etc/apt/sources.list"
rm -f "$new"/etc/resolv.conf "$new"/etc/hostname "$new"/etc/machine-id
touch "$new/etc/machine-id"
# No console login: the box's console is the test's.
ln -sf /dev/null "$new/etc/systemd/system/console-getty.service"
ln -sf /dev/null "$new/etc/systemd/system/serial-getty@ttyS0.service"
