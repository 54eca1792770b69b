package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// markName is the file in the runtime folder that says which rules a start may adopt: an agent of
// this boot put jumps in, and had seen the ports ready that they lead to. It holds the boot's id.
// Rules without it were restored by something else at boot (netfilter-persistent, a snapshot of the
// VM) before Envoy could accept anything.
const markName = "intercepting"

// mark is that file.
type mark struct {
	dir string
	set bool // an agent of this boot put jumps in
	// written: the file says so. A folder may be full for a while.
	written, failed bool
	log             *zap.Logger
}

// readMark looks for the mark of this boot. Where there is none, but an agent was ready in this
// boot, it was of a version that made none, and this one comes by an upgrade.
func readMark(dir string, log *zap.Logger) *mark {
	id, err := os.ReadFile(filepath.Join(dir, markName))
	if errors.Is(err, fs.ErrNotExist) {
		_, err := os.Lstat(filepath.Join(dir, systemd.ReadyFile))
		return &mark{dir: dir, set: err == nil, log: log}
	}
	set := err == nil && identity.Boot(string(id)) == bootID()
	return &mark{dir: dir, set: set, written: set, log: log}
}

// put says that the jumps are about to go in.
func (m *mark) put() {
	m.set = true
	if m.written {
		return
	}
	err := writeMark(m.dir, bootID())
	m.written = err == nil
	if err != nil && !m.failed {
		m.log.Warn("a restart while Envoy is away will take the jumps out", zap.Error(err))
	}
	m.failed = err != nil
}

// bootID is the kernel's random id of this boot (random(4)), "" where /proc does not tell.
func bootID() string { return identity.Here("").Boot }

// writeMark replaces the file. Root writes it, too (cleanup), in a folder of the agent's user:
// links are not followed, and that user can replace it again.
func writeMark(dir, boot string) error {
	return atomicfile.Write(filepath.Join(dir, markName), []byte(boot+"\n"), 0o644)
}

// Mark makes the mark that of this boot, for rules that another agent has put in and ours takes
// over: the ports that they lead to were in use.
func Mark() error {
	if err := writeMark(server.Dir(), bootID()); err != nil {
		return fmt.Errorf("have the rules adopted: %w", err)
	}
	return nil
}

// Unmark makes the mark that of no boot. Call it when the rules were taken out: what is there later
// was put there by somebody else.
func Unmark() error {
	err := writeMark(server.Dir(), "none")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no agent has run
		return fmt.Errorf("forget that the rules are ours: %w", err)
	}
	return nil
}

// markingKernel puts the mark before jumps go in: an agent that dies in between must find it.
type markingKernel struct {
	reconcile.Kernel
	mark *mark
}

// Apply is Kernel's.
func (k markingKernel) Apply(ctx context.Context, p iptables.Plan) (iptables.Result, error) {
	if p.Intercepting() {
		k.mark.put()
	}
	return k.Kernel.Apply(ctx, p)
}
