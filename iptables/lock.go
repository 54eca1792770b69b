package iptables

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockFile is what iptables-legacy locks unless XTABLES_LOCKFILE names another.
const lockFile = "/run/xtables.lock"

func lockPath() string {
	if path := os.Getenv("XTABLES_LOCKFILE"); path != "" {
		return path
	}
	return lockFile
}

// lockLook is how often it is looked who holds the lock while a command of ours may wait for it: a
// shorter wait may not be seen.
const lockLook = 5 * time.Millisecond

// waiting runs a command of legacy, and says for how much of it another program held the lock.
// iptables does not tell (it blocks in flock(2) from 1.8.8 on, and tries again each second before),
// and to take the lock to see whether it is free would fail the iptables of others that do not
// wait. The kernel's list of locks is free to read. See docs/design/facts.md#legacy-lock.
func waiting(holder func() int, own *ownPIDs, run func() error) (waited time.Duration, err error) {
	began := time.Now()
	ended, told := make(chan struct{}), make(chan time.Duration)
	go func() {
		ticker := time.NewTicker(lockLook)
		defer ticker.Stop()
		var waited time.Duration
		for {
			select {
			case <-ended:
				told <- waited
				return
			case <-ticker.C:
				if pid := holder(); pid != 0 && !own.has(pid) {
					waited = time.Since(began)
				}
			}
		}
	}()
	err = run()
	close(ended)
	return <-told, err
}

// lockHolder is the pid of who holds the xtables lock, 0 for nobody.
func lockHolder() int {
	var file unix.Stat_t
	if unix.Stat(lockPath(), &file) != nil {
		return 0
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0
	}
	return holderIn(locks, fmt.Sprintf("%02x:%02x:%d",
		unix.Major(file.Dev), unix.Minor(file.Dev), file.Ino))
}

// holderIn finds who holds a flock on a file in what /proc/locks says (proc_locks(5)):
//
//	1: FLOCK  ADVISORY  WRITE 18629 00:1a:2642 0 EOF
//	1: -> FLOCK  ADVISORY  WRITE 18700 00:1a:2642 0 EOF
//
// The second one waits for the first.
func holderIn(locks []byte, file string) (pid int) {
	for lines := bufio.NewScanner(bytes.NewReader(locks)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) >= 6 && f[1] == "FLOCK" && f[5] == file {
			pid, _ = strconv.Atoi(f[4])
			return pid
		}
	}
	return 0
}
