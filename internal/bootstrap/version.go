package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

var (
	errBinary = errors.New("bad Envoy")
	errUntold = errors.New("cannot tell whether this Envoy works")
)

var versionForm = regexp.MustCompile(`/(\d+\.\d+\.\d+)[-/]`)

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
	version, err := envoyadmin.ParseVersion(m[1])
	if err != nil || version.Less(envoyadmin.Advised) {
		return m[1], fmt.Errorf("%w: version %s is too old, want %v or later",
			errBinary, m[1], envoyadmin.Advised)
	}
	return m[1], nil
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
