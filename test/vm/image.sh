#!/bin/sh
# Makes what a VM of a release boots from: image.sh BASE RUNNER DIR. BASE is a root filesystem of
# test/box/rootfs.sh and stays as it is; RUNNER is the program of test/vm/runner. DIR gets vmlinuz
# and initrd.img of Debian's linux-image-cloud-ARCH, which Compute Engine's images boot, and
# root.ext4. test/kept.sh runs it, and keeps what it made.
set -eu
base=$1 runner=$2 new=$3
mkdir "$new" "$new.upper" "$new.work" "$new.root"
trap 'rm -rf "$new.upper" "$new.work" "$new.root"' EXIT
unshare --mount sh -eu -c '
	base=$1 runner=$2 new=$3 root=$3.root
	# userxattr: in a user namespace (test/foreign.sh) it may write no other attributes.
	mount -t overlay overlay -o \
		"userxattr,lowerdir=$base,upperdir=$new.upper,workdir=$new.work" "$root"
	mount -t proc proc "$root/proc"
	for device in null zero full random urandom tty; do # the base of a foreign one has files for them
		mount --bind "/dev/$device" "$root/dev/$device"
	done
	release=$(. "$root/etc/os-release"; echo "$VERSION_CODENAME")
	list=$root/etc/apt/sources.list.d/kernel.list
	echo "deb http://deb.debian.org/debian $release main" >"$list"
	cp /etc/resolv.conf "$root/etc/"
	chroot "$root" apt-get -qq update
	export DEBIAN_FRONTEND=noninteractive
	# A box shows that bootstrap installs what is missing; an emulated processor takes minutes for it.
	chroot "$root" apt-get -qq -y --no-install-recommends install \
		ca-certificates initramfs-tools iptables kmod nftables udev
	# All modules would be ten times as much for an emulated processor to unpack.
	sed -i "s/^MODULES=.*/MODULES=list/" "$root/etc/initramfs-tools/initramfs.conf"
	printf "%s\n" virtio_pci virtio_blk ext4 crc32c_generic >>"$root/etc/initramfs-tools/modules"
	chroot "$root" apt-get -qq -y --no-install-recommends install \
		"linux-image-cloud-$(chroot "$root" dpkg --print-architecture)"
	chroot "$root" apt-get clean
	rm -rf "$list" "$root"/var/lib/apt/lists/* "$root/etc/resolv.conf"

	cp "$root"/boot/vmlinuz-* "$new/vmlinuz"
	cp "$root"/boot/initrd.img-* "$new/initrd.img"
	install "$runner" "$root/usr/local/bin/runner"
	unit() { cat >"$root/etc/systemd/system/$1"; }
	unit runner.service <<-END
		[Unit]
		DefaultDependencies=no
		After=systemd-udevd.service systemd-remount-fs.service systemd-tmpfiles-setup-dev.service
		StartLimitIntervalSec=0
		[Service]
		ExecStart=/usr/local/bin/runner
		Restart=always
		RestartSec=1
		OOMScoreAdjust=-900
		[Install]
		WantedBy=sysinit.target
	END
	unit application.service <<-END
		[Service]
		ExecStart=/usr/local/bin/runner serve :8080
		[Install]
		WantedBy=multi-user.target
	END
	cat >"$root/etc/systemd/network/eth0.network" <<-END
		[Match]
		Name=eth0
		[Network]
		Address=10.128.0.2/24
		Address=fd28::2/64
		Gateway=10.128.0.1
		Gateway=fd28::1
		IPv6AcceptRA=no
	END
	chroot "$root" systemctl -q enable runner application systemd-networkd
	rm -f "$root/var/lib/dbus/machine-id"
	tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
	# Nobody logs in, the clock is for the test to set, and what looks after a machine for years takes
	# an emulated processor minutes.
	chroot "$root" systemctl -q mask systemd-timesyncd serial-getty@ttyS1 serial-getty@ttyAMA0 \
		getty@tty1 e2scrub_reap e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer fstrim.timer \
		dpkg-db-backup.timer systemd-networkd-wait-online 2>/dev/null
	umount "$root/proc"
	truncate -s 4G "$new/root.ext4"
	mkfs.ext4 -q -F -d "$root" "$new/root.ext4"
	' image "$base" "$runner" "$new" >"$new.log" 2>&1 || { tail -5 "$new.log" >&2; exit 1; }
rm "$new.log"
