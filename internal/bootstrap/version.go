package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// MinimumEnvoy is the oldest Envoy that is installed or kept: older ones have no
// drain_listeners?graceful&skip_exit we can rely on, and known holes.
var MinimumEnvoy = [3]int{1, 24, 9}

var (
	errBinary = errors.New("bad Envoy")
	errUntold = errors.New("cannot tell whether this Envoy works")
)

var versionForm = regexp.MustCompile(`/(\d+)\.(\d+)\.(\d+)[-/]`)

// envoyVersion runs the binary, as Envoy's user, and returns its version: fs.ErrNotExist when there
// is none, errBinary when it is no Envoy that can be used, and errUntold when it was not let run to
// its end.
func (b *bootstrapper) envoyVersion(ctx context.Context, binary string) (string, error) {
	if _, err := os.Stat(b.path(binary)); err != nil {
		return "", err
	}
	as, err := b.envoyCredential()
	if err != nil {
		return "", err
	}
	out, err := b.execAs(ctx, 20*time.Second, as, b.path(binary), "--version")
	if err != nil {
		kind := errUntold
		if failedByItself(err) {
			kind = errBinary
		}
		return "", fmt.Errorf("%w: %w", kind, said(err, out))
	}
	m := versionForm.FindStringSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%w: it does not say its version: %.80q", errBinary, out)
	}
	version := strings.Join(m[1:4], ".")
	for i, part := range m[1:4] {
		n, err := strconv.Atoi(part)
		if err != nil || n < MinimumEnvoy[i] {
			return version, fmt.Errorf("%w: version %s is too old, want %d.%d.%d or later",
				errBinary, version, MinimumEnvoy[0], MinimumEnvoy[1], MinimumEnvoy[2])
		}
		if n > MinimumEnvoy[i] {
			break
		}
	}
	return version, nil
}

// failedByItself says that a command failed for what it is, and will again: the kernel cannot run
// it (ENOENT: the loader it names is not there), or it gave up. A time-out, a signal and a fork
// that failed say more of the VM: a slow disk, no memory.
func failedByItself(err error) bool {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.Exited()
	}
	for _, errno := range []syscall.Errno{syscall.ENOEXEC, syscall.EACCES, syscall.ENOENT,
		syscall.ELIBBAD} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// envoyCredential is Envoy's user, for what is run in its place; nil beneath another root, where
// nothing is owned.
func (b *bootstrapper) envoyCredential() (*syscall.Credential, error) {
	if b.Root != "" {
		return nil, nil
	}
	uid, gid, err := lookup(EnvoyUser)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}
