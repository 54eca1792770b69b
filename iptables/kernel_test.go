package iptables

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestProbeMeetsTheMoment: a lock that is held, and a program that does not end, when a family is
// tried make it neither unusable nor usable again, and the next read says itself what it met.
func TestProbeMeetsTheMoment(t *testing.T) {
	const (
		version = "[ \"$1\" != --version ] || { echo 'iptables v1.8.9 (legacy)'; exit 0; }\n"
		locked  = version +
			"echo 'Another app is currently holding the xtables lock; still 0s 0us time ahead to have a chance to grab the lock...' >&2; exit 4\n"
		noTable = version +
			"echo \"iptables v1.8.9 (legacy): can't initialize iptables table 'nat': Table does not exist (do you need to insmod?)\" >&2; exit 3\n"
		works = version
		hangs = "exec sleep 60\n"
	)
	dir := t.TempDir()
	put := func(name, script string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file+".new", []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
		put(name+"-save", "exit 0\n")
		put(name+"-restore", "exit 0\n")
	}
	for _, test := range []struct {
		name, at, then string
		unusable       error // after the second probe
		read           error
	}{
		{"locked", locked, "", nil, nil},
		{"locked twice", locked, locked, nil, nil},
		{"locked, then no table", locked, noTable, ErrNoTable, ErrUnusable},
		{"no table, then locked", noTable, locked, ErrNoTable, ErrUnusable},
		{"no table, then there", noTable, works, nil, nil},
		{"the version not told in time", hangs, "", nil, ErrCouldNotLook},
		{"the version told at last", hangs, works, nil, nil},
		{"not told at first, and there only when it is read", hangs, "works", nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			put("iptables-legacy", test.at)
			put("ip6tables-legacy", works)
			patience := func(hangs bool) context.Context {
				ctx, cancel := t.Context(), func() {}
				if hangs {
					ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				}
				t.Cleanup(cancel)
				return ctx
			}
			k := &Kernel{options: Options{Backend: Legacy, Path: dir}, machine: thisMachine,
				tools: map[Family]tool{}, unusable: map[Family]error{}, saves: map[string]lastSave{}}
			first := k.Probe(patience(test.at == hangs), IPv4)
			if first == nil {
				t.Fatal("the first probe found nothing wrong")
			}
			switch test.then {
			case "":
			case "works":
				put("iptables-legacy", works)
			default:
				put("iptables-legacy", test.then)
				k.Probe(t.Context(), IPv4)
			}
			state := k.Families()[0]
			if !errors.Is(state.Why, test.unusable) || (state.Why == nil) != (test.unusable == nil) {
				t.Errorf("%+v after %v, want %v", state, first, test.unusable)
			}
			if _, err := k.Read(patience(test.read == ErrCouldNotLook), IPv4); !errors.Is(err, test.read) {
				t.Errorf("read: %v, want %v", err, test.read)
			}
		})
	}
}

// TestOpenWhileLocked: an agent that starts while both families' lock is held has a
// kernel to go on with.
func TestOpenWhileLocked(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
		for suffix, script := range map[string]string{
			"-save": "", "-restore": "",
			"": "[ \"$1\" != --version ] || { echo 'iptables v1.8.9 (legacy)'; exit 0; }\necho 'Another app is currently holding the xtables lock.' >&2; exit 4\n",
		} {
			if err := os.WriteFile(filepath.Join(dir, name+suffix), []byte("#!/bin/sh\n"+script),
				0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	k, err := Open(t.Context(), Options{Backend: Legacy, Path: dir})
	if err != nil || k.Backend() != Legacy {
		t.Fatalf("%v, backend %q", err, k.Backend())
	}
	for _, f := range k.Families() {
		if f.Why != nil {
			t.Errorf("%v is unusable: %v", f.Family, f.Why)
		}
	}
}

// TestRunOutOfMemory: a program that was killed, or that a machine at its limits could not start,
// tells nothing of the family: what was known of it stands.
func TestRunOutOfMemory(t *testing.T) {
	run := func(script string) error {
		var out bytes.Buffer
		return runInto(t.Context(), time.Minute, &ownPIDs{}, nil, &out, "/bin/sh", "-c", script)
	}
	for script, want := range map[string]bool{"kill -KILL $$": true, "kill -TERM $$": true,
		"ulimit -c 0; kill -SEGV $$": false, "exit 3": false} {
		if err := run(script); err == nil || errors.Is(err, ErrCouldNotLook) != want {
			t.Errorf("%s: %v", script, err)
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	err := run("exit 0")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrCouldNotLook) || !errors.Is(err, unix.EMFILE) {
		t.Errorf("no file left: %v", err)
	}
	for errno, want := range map[error]bool{unix.EAGAIN: true, unix.ENOMEM: true, unix.ENFILE: true,
		unix.EACCES: false} {
		err := notStarted("sh", &os.PathError{Op: "fork/exec", Path: "sh", Err: errno})
		if errors.Is(err, ErrCouldNotLook) != want || !errors.Is(err, errno) {
			t.Error(err)
		}
	}
}
