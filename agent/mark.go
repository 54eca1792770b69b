package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// markName is the file in the runtime folder that says which rules a start may adopt: an agent of this boot put jumps in,
// and had seen the ports ready that they lead to. It holds the boot's id. Rules without it were restored by something
// else at boot (netfilter-persistent, a snapshot of the VM) before Envoy could accept anything.
const markName = "intercepting"

// bootID is the kernel's random id of this boot (random(4)), "" where /proc does not tell.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// isMarked says whether an agent of this boot put jumps in. Where there is no mark, but an agent was ready in this boot, it
// was of a version that made none, and this one comes by an upgrade.
func isMarked(dir string) bool {
	id, err := os.ReadFile(filepath.Join(dir, markName))
	if errors.Is(err, fs.ErrNotExist) {
		_, err := os.Lstat(filepath.Join(dir, systemd.ReadyFile))
		return err == nil
	}
	return err == nil && strings.TrimSpace(string(id)) == bootID()
}

// mark says that the jumps are about to go in.
func (a *Agent) mark() {
	if a.marked {
		return
	}
	a.marked = true // the folder is a tmpfs: what fails once fails again
	if err := writeMark(bootID()); err != nil {
		a.log.Warn("a restart while Envoy is away will take the jumps out", zap.Error(err))
	}
}

// writeMark replaces the file. Root writes it, too (cleanup), in a folder of the agent's user: links are not followed, and
// that user can replace it again.
func writeMark(boot string) error {
	return atomicfile.Write(filepath.Join(server.Dir(), markName), []byte(boot+"\n"), 0o644)
}

// Unmark makes the mark that of no boot. Call it when the rules were taken out: what is there later was put there by
// somebody else.
func Unmark() error {
	err := writeMark("none")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no agent has run
		return fmt.Errorf("forget that the rules are ours: %w", err)
	}
	return nil
}
