package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// supervise puts the supervisor of Envoy's unit before Envoy: that is the process of e then.
func (e *Envoy) supervise(opts EnvoyOptions) error {
	dir := filepath.Join(e.lab.Dir, "envoy-run")
	if err := os.Mkdir(dir, 0o750); err != nil {
		return fmt.Errorf("make the runtime folder of Envoy's unit: %w", err)
	}
	if err := os.Chown(dir, int(opts.UID), int(opts.UID)); err != nil {
		return fmt.Errorf("make the runtime folder of Envoy's unit: %w", err)
	}
	// What a supervisor that was killed leaves; its unit has a /dev/shm of its own.
	e.lab.atEnd(func() {
		text, _ := os.ReadFile(filepath.Join(dir, "base-ids"))
		for _, base := range strings.Fields(string(text)) {
			os.Remove("/dev/shm/envoy_shared_memory_" + base + "0")
		}
	})
	program, err := e.lab.reachable(opts.Supervisor, opts.UID)
	if err != nil {
		return err
	}
	start := []string{program, "envoy", "--dir", dir}
	e.reload = append(slices.Clone(start), "--reload")
	e.argv = slices.Concat(start, opts.SupervisorArgs, []string{"--"}, e.argv)
	return nil
}

// Reload is `systemctl reload` of a supervised Envoy: what ExecReload= does, as Envoy's user.
func (e *Envoy) Reload(ctx context.Context) (code int, said string, err error) {
	cmd := e.lab.VM.CommandAs(ctx, e.UID, e.reload[0], e.reload[1:]...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), strings.TrimSpace(string(out)), nil
	}
	return 0, strings.TrimSpace(string(out)), err
}

// SetBootstrap replaces the configuration that the next start, or epoch, reads.
func (e *Envoy) SetBootstrap(text []byte) error { return os.WriteFile(e.config, text, 0o644) }

// Bootstrap is the configuration that the next start reads.
func (e *Envoy) Bootstrap() ([]byte, error) { return os.ReadFile(e.config) }

// Epoch is a process of a supervised Envoy.
type Epoch struct {
	PID, Epoch int
	RSS        int64 // bytes

	started uint64 // in the kernel's ticks
}

func (e Epoch) String() string {
	return fmt.Sprintf("epoch %d (pid %d) %d MiB", e.Epoch, e.PID, e.RSS>>20)
}

// Signal sends to it; one that has just ended is what was wanted.
func (e Epoch) Signal(sig syscall.Signal) { _ = syscall.Kill(e.PID, sig) }

// Epochs are the processes of a supervised Envoy that run, oldest first.
func (e *Envoy) Epochs() (all []Epoch) {
	supervisor := strconv.Itoa(e.PID())
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue // it has ended
		}
		f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		args, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(f) < 22 || f[1] != supervisor || f[0] == "Z" {
			continue
		}
		argv := strings.Split(string(args), "\x00")
		at := slices.Index(argv, "--restart-epoch")
		if at < 0 || at+1 >= len(argv) {
			continue // just forked, or a question to the program
		}
		epoch := Epoch{}
		epoch.started, _ = strconv.ParseUint(f[19], 10, 64)
		epoch.PID, _ = strconv.Atoi(filepath.Base(dir))
		epoch.Epoch, _ = strconv.Atoi(argv[at+1])
		pages, _ := strconv.ParseInt(f[21], 10, 64)
		epoch.RSS = pages * int64(os.Getpagesize())
		all = append(all, epoch)
	}
	slices.SortFunc(all, func(a, b Epoch) int {
		return cmp.Or(cmp.Compare(a.started, b.started), cmp.Compare(a.Epoch, b.Epoch))
	})
	return all
}
