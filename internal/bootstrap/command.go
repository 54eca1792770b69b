package bootstrap

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// exec runs a command and returns the last that it printed, where commands say what was wrong.
func (b *bootstrapper) exec(
	ctx context.Context, limit time.Duration, name string, args ...string,
) (string, error) {
	return b.execAs(ctx, limit, nil, name, args...)
}

// execAs runs it as another user; nil: as ours.
func (b *bootstrapper) execAs(
	ctx context.Context, limit time.Duration, as *syscall.Credential, name string, args ...string,
) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	out := &tail{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 2 * time.Second
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	err := b.command(ctx, cmd)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("no end after %v", limit)
	}
	if err != nil {
		return out.String(), fmt.Errorf("run %s: %w", filepath.Base(name), err)
	}
	return out.String(), nil
}

// systemctl runs systemctl. An error holds its own words.
func (b *bootstrapper) systemctl(ctx context.Context, limit time.Duration, args ...string) error {
	if out, err := b.exec(ctx, limit, "systemctl", args...); err != nil {
		return said(err, out)
	}
	return nil
}

// said adds a command's own words, its last line, to its error.
func said(err error, out string) error {
	if last := lastLine(out); last != "" {
		return fmt.Errorf("%w: %s", err, last)
	}
	return err
}

// lastLine is what may be told of the last line that is not empty: Envoy quotes its configuration.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return redaction.Text(lines[len(lines)-1])
}

// tail keeps the last bytes written.
type tail struct {
	buf []byte
	cut bool
}

const maxTail = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if len(t.buf) > maxTail {
		t.buf, t.cut = append(t.buf[:0], t.buf[len(t.buf)-maxTail:]...), true
	}
	return len(p), nil
}

// String is without a line whose beginning was not kept: it may be a quoted value's second half,
// which package redaction could not tell from other text.
func (t *tail) String() string {
	text := string(t.buf)
	if t.cut {
		_, text, _ = strings.Cut(text, "\n")
	}
	return text
}
