//go:build lab

package curve

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// busy is what Envoy's main thread, which answers the admin interface, has used of a processor
// (proc_pid_schedstat: nanoseconds, where stat has ticks of 10 ms).
func busy(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, pid))
	must(t, err)
	ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
	must(t, err)
	return time.Duration(ns)
}

// used is what a process has used with those of its children that have ended: fields of
// proc_pid_stat(5), counted after the command's name. USER_HZ is 100 everywhere.
func used(t testing.TB, pid int) (d time.Duration) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	for _, i := range []int{11, 12, 13, 14} {
		n, err := strconv.Atoi(f[i])
		must(t, err)
		d += time.Duration(n) * 10 * time.Millisecond
	}
	return d
}

// resident is what a process and its children hold just now, in MB. Those that end meanwhile hold
// nothing.
func resident(pid int) (mb float64) {
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid)); err == nil {
		var size, pages int
		fmt.Sscan(string(text), &size, &pages)
		mb = float64(pages*os.Getpagesize()) / (1 << 20)
	}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return mb
	}
	for _, path := range children {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for child := range strings.FieldsSeq(string(text)) {
			if n, err := strconv.Atoi(child); err == nil {
				mb += resident(n)
			}
		}
	}
	return mb
}

// connect is how long connecting takes on the thread that it is called on. No TIME_WAIT is left.
func connect(to unix.Sockaddr) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER,
		&unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	began := time.Now()
	err = unix.Connect(fd, to)
	return time.Since(began), err
}

var number = regexp.MustCompile(`\d+\.\d+[^\s/]*`)

// versions of what takes part, by what each says itself.
func versions(t testing.TB, agent, envoy string) map[string]string {
	t.Helper()
	say := func(argv ...string) string {
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).Output()
		must(t, err)
		return string(out)
	}
	said := map[string]string{
		"service-proxy-agent": strings.Fields(say(agent, "version"))[1], // may be a commit
		"envoy":               number.FindString(say(envoy, "--version")),
	}
	for _, name := range []string{"iptables", "curl", "jq"} {
		said[name] = number.FindString(say(name, "--version"))
	}
	return said
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
