package iptables

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoModules: the kernel loads no module before the next boot, so that no modprobe helps.
var ErrNoModules = errors.New("no module can be loaded before a reboot")

// noModules is why the kernel that runs cannot load what it lacks, as an ErrNoModules, or nil. It
// is nil, too, where that cannot be told: a kernel without modules has no /proc/modules, and
// systemd's ProtectKernelModules= hides the folder from the daemon.
func noModules(root fs.FS, release string) error {
	if _, err := fs.Stat(root, "proc/modules"); err != nil {
		return nil
	}
	off, err := fs.ReadFile(root, "proc/sys/kernel/modules_disabled")
	if err == nil && strings.TrimSpace(string(off)) == "1" {
		return fmt.Errorf("%w: kernel.modules_disabled is set", ErrNoModules)
	}
	// An upgrade may have taken the modules of the kernel that runs away.
	_, err = fs.Stat(root, "lib/modules/"+release)
	if release != "" && errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: /lib/modules/%s is not there", ErrNoModules, release)
	}
	return nil
}

// noModulesHere is noModules of this machine.
func noModulesHere() error {
	var name unix.Utsname
	if unix.Uname(&name) != nil { // it cannot fail
		return nil
	}
	return noModules(os.DirFS("/"), unix.ByteSliceToString(name.Release[:]))
}
