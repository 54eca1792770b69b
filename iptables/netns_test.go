//go:build kernel

package iptables

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNetns runs the calling (sub)test in a network namespace of its own: it starts the test
// binary anew for that one test and says false; in the copy it says true. A whole process in
// the namespace needs no thread to be pinned, and nothing of it is left when it ends. It needs
// root, and fails without.
func inNetns(t *testing.T) bool {
	t.Helper()
	return inNamespaces(t, syscall.CLONE_NEWNET)
}

func inNamespaces(t *testing.T, flags uintptr) bool {
	t.Helper()
	if os.Getenv("IPTABLES_TEST_NETNS") == t.Name() {
		sh(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes a network namespace")
	}
	anew(t, &syscall.SysProcAttr{Cloneflags: flags})
	return false
}

// asOrdinaryUser runs a (sub)test that is in its namespace already once more as the agent's
// unit runs the agent: a user of its own, in the given groups, with two ambient capabilities.
// In the copy it says true.
func asOrdinaryUser(t *testing.T, groups ...uint32) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		return true
	}
	anew(t, &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: 65534, Gid: 65534, Groups: groups},
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW},
	})
	return false
}

// anew runs this test in a new process of the test binary.
func anew(t *testing.T, attributes *syscall.SysProcAttr) {
	t.Helper()
	var pattern []string
	for name := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+name+"$")
	}
	limit := "2m"
	if soak() {
		limit = "2h"
	}
	args := []string{"-test.run=" + strings.Join(pattern, "/"), "-test.count=1",
		"-test.timeout=" + limit}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "IPTABLES_TEST_NETNS="+t.Name())
	cmd.SysProcAttr = attributes
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in its namespace: %v\n%s", err, out)
	} else if testing.Verbose() {
		t.Logf("\n%s", out)
	}
}

// eachBackend runs a test for both backends and both families, each in a namespace of its own.
func eachBackend(t *testing.T, test func(t *testing.T, k *Kernel, f Family)) {
	for _, backend := range []string{NFT, Legacy} {
		t.Run(backend, func(t *testing.T) {
			for _, f := range families {
				t.Run(f.String(), func(t *testing.T) {
					outer := os.Getenv("IPTABLES_TEST_NETNS")
					if outer != "" && outer != t.Name() {
						return // this process is for another one
					}
					if inNetns(t) {
						test(t, open(t, backend), f)
					}
				})
			}
		})
	}
}

func open(t testing.TB, backend string) *Kernel {
	t.Helper()
	k, err := Open(context.Background(), Options{Backend: backend})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sh runs a command that must succeed and returns what it said.
func sh(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// command is the name of a family's program for a backend, e.g. "ip6tables-legacy-save".
func command(backend string, f Family, suffix string) string {
	name := "iptables-"
	if f == IPv6 {
		name = "ip6tables-"
	}
	return name + backend + suffix
}

func restoreText(t testing.TB, backend string, f Family, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, command(backend, f, "-restore"), "--noflush", "-w", "5")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s\n%s", cmd, err, out, text)
	}
}

func soak() bool { return os.Getenv("SOAK") == "1" }
